"""Pairs of task gradients: at the parameters, and where each task's loss is worst."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms import loops
from mtl_jax.transforms.aggregation._base import AggregationState, Aggregator
from mtl_jax.transforms.aggregation._engines import LossFn, task_vjp
from mtl_jax.transforms.aggregation._flat import flat_mtl, in_wide, sam_perturbation


class FlatTaskGrads(NamedTuple):
    """Gradients of every task at the parameters and at its own perturbed ones.

    Attributes:
      losses: [T] float32.
      shared: leaves [T, ...], the gradients of the shared leaves; None elsewhere.
      shared_sam: the same at the perturbed parameters.
      rest: leaves [...], the sum over tasks of the gradients of all other leaves, each
        at its task's perturbed parameters; None where shared.
      aux: what the loss function returned besides, at the parameters themselves.
    """

    losses: chex.Array
    shared: Any
    shared_sam: Any
    rest: Any
    aux: Any


def flat_task_grads(
    loss_fn: LossFn,
    *,
    rho_shared: float = 0.05,
    rho_task: float = 0.05,
    shared: tuple[str, ...] | None = None,
    has_aux: bool = False,
) -> Callable[..., FlatTaskGrads]:
    """One pair of gradients per task: of its loss, and of its loss at its worst nearby.

    Each task has its own perturbation, with one norm over the shared leaves and one
    over all others; both gradients see the same arguments, so the same batch and the
    same randomness. Tasks go one after another: 2 T backward and T further forward
    passes, and no gradients of heads are kept per task.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses [T]`, or `(losses, aux)`.
      rho_shared: radius for the shared leaves.
      rho_task: radius for the others, a task's own.
      shared: regular expressions on leaf names; None = all leaves are shared.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `fn(params, *args) -> FlatTaskGrads`.

    Raises:
      ValueError: a radius that is negative, a pattern that finds no leaf, or losses
        that are not [T].

    >>> loss_fn = lambda p: jnp.stack([jnp.sum(jnp.square(p["w"])), jnp.sum(p["w"])])
    >>> found = flat_task_grads(loss_fn, rho_shared=0.5)({"w": jnp.ones(1)})
    >>> found.shared["w"].tolist(), found.shared_sam["w"].tolist()
    ([[2.0], [1.0]], [[3.0], [1.0]])
    """
    for what, rho in (("rho_shared", rho_shared), ("rho_task", rho_task)):
        if not rho >= 0:
            raise ValueError(f"flat_task_grads: {what} is {rho}, wanted 0 or more")

    def fn(params, *args):
        name = "flat_task_grads"
        params = jax.tree.map(jnp.asarray, params)
        split = _splitter(params, shared)
        losses, aux, pullback = task_vjp(name, loss_fn, params, args, has_aux)

        def one(rest, unit):
            ours, own = split(pullback(unit))
            moved = _join(
                params,
                sam_perturbation(ours, rho_shared),
                sam_perturbation(own, rho_task),
            )
            _, _, there = task_vjp(name, loss_fn, moved, args, has_aux)
            ours_sam, own_sam = split(there(unit))
            wide = jax.tree.map(lambda r, x: r + x.astype(r.dtype), rest, own_sam)
            return wide, (ours, ours_sam)

        own = split(params)[1]
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, tree.wide_dtype(p.dtype)), own
        )
        units = jnp.eye(losses.shape[0], dtype=losses.dtype)
        rest, (ours, ours_sam) = loops.scan(one, zeros, units)
        rest = jax.tree.map(lambda r, p: r.astype(p.dtype), rest, own)
        return FlatTaskGrads(losses.astype(jnp.float32), ours, ours_sam, rest, aux)

    return fn


def _splitter(params, shared):
    """A function from trees like `params` to (shared, other) leaves, None elsewhere."""
    chosen = jax.tree.map(lambda _: True, params)
    if shared is not None:
        chosen = tree.select(params, *shared)

    def split(like):
        ours = jax.tree.map(lambda x, c: x if c else None, like, chosen)
        own = jax.tree.map(lambda x, c: None if c else x, like, chosen)
        return ours, own

    return split


def _join(params, ours, own):
    """`params` plus the perturbation of either part."""

    def leaf(p, a, b):
        moved = b if a is None else a
        return p if moved is None else in_wide(jnp.add, p, moved)

    return jax.tree.map(leaf, params, ours, own, is_leaf=lambda x: x is None)


class FlatGradients(NamedTuple):
    """The method as a pair of pure functions.

    Attributes:
      init: `init(params) -> state` of the aggregator.
      update: `update(params, state, *args) -> (losses, grads, state)`, or
        `((losses, aux), grads, state)`: losses [T] float32, grads like `params`.
    """

    init: Callable[[Any], AggregationState]
    update: Callable[..., tuple[Any, Any, AggregationState]]


def value_and_flat_grads(
    loss_fn: LossFn,
    aggregator: Aggregator,
    *,
    rho_shared: float = 0.05,
    rho_task: float = 0.05,
    shared: tuple[str, ...] | None = None,
    mode: str = "individual",
    num_tasks: int | None = None,
    has_aux: bool = False,
) -> FlatGradients:
    """Gradients that lead every task to a flat region of its loss.

    The shared leaves get `flat_mtl` of the task gradients; every other leaf the sum
    over tasks of its gradients at the perturbed parameters, so a head only its own
    task's.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses [T]`, or `(losses, aux)`.
      aggregator: any, for the shared leaves; it is told the `losses`.
      rho_shared: radius for the shared leaves.
      rho_task: radius for the others, a task's own.
      shared: regular expressions on leaf names; None = all leaves are shared.
      mode: see `flat_mtl`.
      num_tasks: see `flat_mtl`.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `FlatGradients`.

    Raises:
      ValueError: as `flat_mtl` and `flat_task_grads`.

    **Follows**: "Improving Multi-task Learning via Seeking Task-based Flat Regions"
      (arXiv 2211.13723), algorithm 1.

    >>> from mtl_jax import aggregation
    >>> loss_fn = lambda p: jnp.square(p["w"] - jnp.array([1.0, 3.0]))
    >>> flat = value_and_flat_grads(loss_fn, aggregation.sum(), rho_shared=0.5)
    >>> params = {"w": jnp.array(2.0)}
    >>> flat.update(params, flat.init(params))[1]["w"].tolist()  # 2 + 1 - 2 - 1
    0.0
    """
    flat = flat_mtl(aggregator, mode=mode, num_tasks=num_tasks)
    gradients = flat_task_grads(
        loss_fn,
        rho_shared=rho_shared,
        rho_task=rho_task,
        shared=shared,
        has_aux=has_aux,
    )

    def init(params):
        return flat.init(_splitter(params, shared)(params)[0])

    def update(params, state, *args):
        found = gradients(params, *args)
        ours, state = flat.update(
            found.shared,
            state,
            _splitter(params, shared)(params)[0],
            sam_grads=found.shared_sam,
            losses=found.losses,
        )
        grads = jax.tree.map(
            lambda p, a, b: b if a is None else a,
            params,
            ours,
            found.rest,
            is_leaf=lambda x: x is None,
        )
        value = (found.losses, found.aux) if has_aux else found.losses
        return value, grads, state

    return FlatGradients(init, update)
