"""ExcessMTL, more weight for the tasks that are furthest from their optimum."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation import _tracked
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients

_TINY = 1e-7
_BLOCK = 8192


class ExcessMtlState(NamedTuple):
    """State of ExcessMTL.

    Attributes:
      steps: int32 [T], numbers of updates with a gradient of the task.
      squares: leaves [T, ...], sums of squared gradients.
      baseline: [T], mean excess risk of the warm-up.
      logits: [T], logarithms of the weights.
    """

    steps: chex.Array
    squares: Any
    baseline: chex.Array
    logits: chex.Array


def _advance(squares: chex.Array, g: chex.Array) -> tuple[chex.Array, chex.Array]:
    """New squares of one leaf, and its part of the excess [T]."""
    squares = squares + jnp.square(g)
    axes = tuple(range(1, g.ndim))
    excess = jax.lax.dot_general(
        g,
        g * jax.lax.rsqrt(squares + _TINY),
        ((axes, axes), ((0,), (0,))),
        precision="highest",
    )
    return squares, excess.astype(jnp.float32)


def _advance_blocked(
    squares: chex.Array, g: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """As `_advance`, by slices of the flat view: fast where memory is cached."""
    shape = g.shape
    squares, g = (x.reshape(shape[0], -1) for x in (squares, g))
    blocks = g.shape[1] // _BLOCK

    def body(i, carry):
        excess, squares = carry
        s, part = (
            jax.lax.dynamic_slice(x, (0, i * _BLOCK), (shape[0], _BLOCK))
            for x in (squares, g)
        )
        s, more = _advance(s, part)
        moved = jax.lax.dynamic_update_slice(squares, s, (0, i * _BLOCK))
        return excess + more, moved

    start = jnp.zeros(shape[0], jnp.float32)
    excess, squares = jax.lax.fori_loop(0, blocks, body, (start, squares))
    rest, more = _advance(squares[:, blocks * _BLOCK :], g[:, blocks * _BLOCK :])
    squares = jax.lax.dynamic_update_slice(squares, rest, (0, blocks * _BLOCK))
    return squares.reshape(shape), excess + more


def _advance_all(squares: Any, task_grads: Any) -> tuple[Any, chex.Array]:
    """New squares, and the excess [T], `sum g^2 / sqrt(squares)`."""

    def leaf(s, g):
        if not tree.is_inexact(g):
            return s, jnp.zeros(g.shape[0], jnp.float32)
        g = g.astype(s.dtype)
        # Slicing a flat view would gather a sharded leaf; one device shards nothing.
        if jax.device_count() > 1 or g[0].size <= _BLOCK:
            return _advance(s, g)
        return jax.lax.platform_dependent(s, g, cpu=_advance_blocked, default=_advance)

    leaves, treedef = jax.tree.flatten(squares)
    pairs = zip(leaves, jax.tree.leaves(task_grads), strict=True)
    moved, excess = zip(*(leaf(s, g) for s, g in pairs), strict=True)
    return jax.tree.unflatten(treedef, moved), jnp.asarray(sum(excess[1:], excess[0]))


def excess_mtl(
    num_tasks: int, *, step_size: float = 1e-2, warmup: int = 1
) -> Aggregator:
    r"""Weighs tasks by their estimated excess risks.

    With s_t the running sum of g_t^2 per coordinate,

      e[t] = sum g_t^2 / sqrt(s_t + 1e-7)
      w[t] <- w[t] exp(step_size e[t] / e_0[t]), then divided by the sum,

    e_0 being the mean of e over the warm-up of the task, its first updates with a
    gradient, during which its e / e_0 counts as zero.

    Updates: leaves [T, ...] -> [...]. State: an `ExcessMtlState`, T times the
    parameters in float32.

    Args:
      num_tasks: T.
      step_size: of the exponentiated gradient step.
      warmup: number of updates of each task, 1 or more; the paper takes three epochs.

    Raises:
      ValueError: `warmup` below 1; at update, another number of tasks.

    **Follows**: He et al. 2024, "Robust Multi-Task Learning with Excess Risks", eq. 6,
      7 and 9.
    **Differs**: weights have the sum 1 as in the paper; T in the authors' code. The
      paper's warm-up is the same for all tasks; one that is absent from it would be
      divided by zero.

    >>> tx = excess_mtl(2)
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [1.0, 0.5]
    """
    if warmup < 1:
        raise ValueError(f"excess_mtl: warmup is {warmup}, wanted 1 or more")

    def init(params):
        # Arrays of their own each: one buffer cannot be donated twice.
        baseline, logits = jnp.zeros((2, num_tasks), jnp.float32)
        squares = _tracked.zeros(params, num_tasks)
        steps = jnp.zeros(num_tasks, jnp.int32)
        return ExcessMtlState(steps, squares, baseline, logits)

    def update(task_grads, state, **extra):
        del extra
        _tracked.check_count("excess_mtl", task_grads, num_tasks)
        squares, excess = _advance_all(state.squares, task_grads)
        warm = state.steps < warmup
        baseline = state.baseline + jnp.where(warm, excess / warmup, 0)
        relative = jnp.where(warm, 0, excess / (baseline + _TINY))
        logits = jax.nn.log_softmax(state.logits + step_size * relative)
        out = tree.combine(task_grads, jax.nn.softmax(logits))
        steps = state.steps + (excess > 0).astype(jnp.int32)
        return out, ExcessMtlState(steps, squares, baseline, logits)

    return from_gradients("excess_mtl", init, update, per_parameter=True)
