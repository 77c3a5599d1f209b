"""ExcessMTL, more weight for the tasks that are furthest from their optimum."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation import _tracked
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients

_TINY = 1e-7


class ExcessMtlState(NamedTuple):
    """State of ExcessMTL.

    Attributes:
      step: int32, number of updates.
      squares: leaves [T, ...], sums of squared gradients.
      baseline: [T], mean excess risk of the warm-up.
      logits: [T], logarithms of the weights.
    """

    step: chex.Array
    squares: Any
    baseline: chex.Array
    logits: chex.Array


def _excess(squares: Any, task_grads: Any) -> chex.Array:
    """[T], `sum g^2 / sqrt(squares)` with each task's own squares."""

    def leaf(s, g):
        g = g.astype(s.dtype)
        return jnp.sum(
            g * g * jax.lax.rsqrt(s + _TINY), tuple(range(1, g.ndim))
        ).astype(jnp.float32)

    pairs = zip(jax.tree.leaves(squares), jax.tree.leaves(task_grads), strict=True)
    found = [leaf(s, g) for s, g in pairs if tree.is_inexact(g)]
    return sum(found[1:], found[0])


def excess_mtl(
    num_tasks: int, *, step_size: float = 1e-2, warmup: int = 1
) -> Aggregator:
    r"""Weighs tasks by their estimated excess risks.

    With s_t the running sum of g_t^2 per coordinate,

      e[t] = sum g_t^2 / sqrt(s_t + 1e-7)
      w[t] <- w[t] exp(step_size e[t] / e_0[t]), then divided by the sum,

    e_0 being the mean of e over the warm-up, during which w stays at 1 / T.

    Updates: leaves [T, ...] -> [...]. State: an `ExcessMtlState`, T times the
    parameters in float32.

    Args:
      num_tasks: T.
      step_size: of the exponentiated gradient step.
      warmup: number of updates, 1 or more; the paper takes three epochs.

    Raises:
      ValueError: `warmup` below 1; at update, another number of tasks.

    **Follows**: He et al. 2024, "Robust Multi-Task Learning with Excess Risks", eq. 6,
      7 and 9.
    **Differs**: weights have the sum 1 as in the paper; T in the authors' code.

    >>> tx = excess_mtl(2)
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [1.0, 0.5]
    """
    if warmup < 1:
        raise ValueError(f"excess_mtl: warmup is {warmup}, wanted 1 or more")

    def init(params):
        none = jnp.zeros(num_tasks, jnp.float32)
        squares = _tracked.zeros(params, num_tasks)
        return ExcessMtlState(jnp.zeros((), jnp.int32), squares, none, none)

    def update(task_grads, state, **extra):
        del extra
        _tracked.check_count("excess_mtl", task_grads, num_tasks)
        squares = _tracked.track(
            state.squares, task_grads, lambda s, g: s + jnp.square(g)
        )
        excess = _excess(squares, task_grads)
        warm = state.step < warmup
        baseline = state.baseline + jnp.where(warm, excess / warmup, 0)
        relative = excess / (baseline + _TINY)
        moved = jax.nn.log_softmax(state.logits + step_size * relative)
        logits = jnp.where(warm, state.logits, moved)
        out = tree.combine(task_grads, jax.nn.softmax(logits))
        return out, ExcessMtlState(state.step + 1, squares, baseline, logits)

    return from_gradients("excess_mtl", init, update)
