"""Flat regions: every task's own sharpness-aware gradient, around any aggregator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import (
    AggregationState,
    Aggregator,
    all_finite,
    check_task_grads,
)
from mtl_jax.transforms.aggregation._tracked import squares

_MODES = ("direct", "each", "individual", "second")


def sam_perturbation(grads: Any, rho: chex.Array | float) -> Any:
    r"""The step of length rho that raises a loss most, `rho g / |g|`.

    Args:
      grads: tree, the gradient g of one task; one norm over all its leaves.
      rho: radius, 0 or more.

    Returns:
      Tree like `grads`; zero where the gradient is.

    **Follows**: Foret et al. 2021, "Sharpness-Aware Minimization", eq. 2.
    **Differs**: no number is added to the norm: gradients are first divided by their
      largest entry, so that a rescaled loss has the same perturbation.

    >>> sam_perturbation({"w": jnp.array([3.0, 4.0])}, 0.5)["w"].tolist()
    [0.30000001192092896, 0.4000000059604645]
    """
    leaves = [x.astype(tree.wide_dtype(x.dtype)) for x in jax.tree.leaves(grads)]
    if not leaves:
        return grads
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves if x.size]))
    some = largest > 0
    unit = jnp.where(some, largest, 1)
    square = sum(jnp.sum(jnp.square(x / unit.astype(x.dtype))) for x in leaves)
    scale = jnp.where(some, rho / jnp.sqrt(jnp.where(some, square, 1)), 0)

    def leaf(x):
        wide = tree.wide_dtype(x.dtype)
        step = x.astype(wide) / unit.astype(wide) * scale.astype(wide)
        return step.astype(x.dtype)

    return jax.tree.map(leaf, grads)


class FlatState(NamedTuple):
    """States of the aggregator, one for each of its uses.

    Attributes:
      loss: for the gradients of the losses, or for the only ones there are.
      flat: for what flatness adds to them; () where the mode has no such use.
      last: for the sum of both; () where the mode has no such use.
    """

    loss: Any
    flat: Any = ()
    last: Any = ()


def flat_mtl(
    aggregator: Aggregator,
    *,
    mode: str = "individual",
    num_tasks: int | None = None,
    floor: float = 1e-5,
) -> Aggregator:
    """Aggregates losses and their flatness apart.

    With g_t the gradient of a loss, s_t that at the task's own perturbed parameters and
    f_t = s_t - g_t, the update is

      individual  A(g_1, .., g_T) + A(f_1, .., f_T)
      direct      A(s_1, .., s_T)
      second      A(A(g_1, .., g_T), A(f_1, .., f_T))
      each        A(A(g_1, f_1), .., A(g_T, f_T))

    Args:
      aggregator: A. In the last two modes it sees two rows as well as T, so its state
        must not depend on the number of rows.
      mode: see above.
      num_tasks: T; mode "each" wants it, for its T states.
      floor: an f_t shorter than this share of g_t counts as zero. Methods that bring
        gradients to one length, such as `nash_mtl`, would make as much of its rounding
        as of a gradient.

    Returns:
      An `Aggregator` whose update takes the g as updates, leaves [T, ...], and the s as
      `sam_grads`, a tree like them. Further arguments go to A, but to no use of two
      rows. `value_and_flat_grads` makes both trees.

    Raises:
      ValueError: an unknown mode, no `num_tasks` where it is wanted, a floor that is
        negative; in the update, no `sam_grads`, or some that do not fit.

    **Follows**: "Improving Multi-task Learning via Seeking Task-based Flat Regions"
      (arXiv 2211.13723), algorithm 1 and its variants.
    **Differs**: the floor is ours.

    >>> from mtl_jax import aggregation
    >>> flat = flat_mtl(aggregation.mean())
    >>> g, s = {"w": jnp.array([[1.0], [3.0]])}, {"w": jnp.array([[2.0], [4.0]])}
    >>> flat.update(g, flat.init({"w": jnp.zeros(1)}), sam_grads=s)[0]["w"].tolist()
    [3.0]
    """
    if mode not in _MODES:
        known = ", ".join(_MODES)
        raise ValueError(f"flat_mtl: mode is {mode!r}, wanted one of {known}")
    if mode == "each" and num_tasks is None:
        raise ValueError('flat_mtl: mode "each" wants num_tasks')
    if not floor >= 0:
        raise ValueError(f"flat_mtl: floor is {floor}, wanted 0 or more")

    def init(params):
        first = aggregator.init(params)
        if mode == "direct":
            method = FlatState(first)
        elif mode == "individual":
            method = FlatState(first, aggregator.init(params))
        elif mode == "second":
            states = [aggregator.init(params) for _ in range(3)]
            method = FlatState(*states)
        else:
            each = jax.vmap(lambda _: aggregator.init(params))(jnp.arange(num_tasks))
            method = FlatState(each, (), first)
        return AggregationState(method, jnp.asarray(True))

    def update(updates, state, params=None, *, sam_grads=None, **extra):
        check_task_grads("flat_mtl", updates, params)
        if sam_grads is None:
            raise ValueError("flat_mtl: the update needs `sam_grads`, a tree like it")
        tree.check_match(
            "flat_mtl",
            updates,
            sam_grads,
            reference_name="updates",
            other_name="sam_grads",
        )
        flat = () if mode == "direct" else _flatness(sam_grads, updates, floor)
        given = Given(updates, sam_grads, flat)
        out, method = _RUN[mode](aggregator, given, state.method, params, extra)
        finite = all_finite(updates) & all_finite(sam_grads)
        return out, AggregationState(method, finite)

    return Aggregator(
        init,
        update,
        per_parameter=getattr(aggregator, "per_parameter", False),
        wants=("sam_grads",),
    )


class Given(NamedTuple):
    """Task gradients: of the losses, at the perturbed places, and how these differ."""

    grads: Any
    sam: Any
    flat: Any


def _flatness(s, g, floor):
    """What flatness adds, s - g, without what is rounding of either."""
    found = jax.tree.map(lambda a, b: in_wide(jnp.subtract, a, b), s, g)
    if not floor:
        return found
    keep = jnp.sqrt(squares(found)) >= floor * jnp.sqrt(squares(g))
    # NaN and infinity are not hidden.
    keep |= ~jnp.isfinite(squares(found))

    def leaf(x):
        return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return jax.tree.map(leaf, found)


def _add(a, b):
    return jax.tree.map(lambda x, y: in_wide(jnp.add, x, y), a, b)


def in_wide(operation: Callable[..., chex.Array], x: chex.Array, y: chex.Array):
    """`operation(x, y)` in float32 or wider, in the dtype of x."""
    wide = tree.wide_dtype(x.dtype)
    return operation(x.astype(wide), y.astype(wide)).astype(x.dtype)


def _pair(a, b, axis=0):
    return jax.tree.map(lambda x, y: jnp.stack([x, y], axis), a, b)


def _individual(aggregator, given, state, params, extra):
    loss, first = aggregator.update(given.grads, state.loss, params, **extra)
    flat, second = aggregator.update(given.flat, state.flat, params, **extra)
    return _add(loss, flat), FlatState(first, second)


def _direct(aggregator, given, state, params, extra):
    out, new = aggregator.update(given.sam, state.loss, params, **extra)
    return out, FlatState(new)


def _second(aggregator, given, state, params, extra):
    loss, first = aggregator.update(given.grads, state.loss, params, **extra)
    flat, second = aggregator.update(given.flat, state.flat, params, **extra)
    out, last = aggregator.update(_pair(loss, flat), state.last, params)
    return out, FlatState(first, second, last)


def _each(aggregator, given, state, params, extra):
    pairs = _pair(given.grads, given.flat, axis=1)
    rows, states = jax.vmap(lambda x, one: aggregator.update(x, one, params))(
        pairs, state.loss
    )
    out, last = aggregator.update(rows, state.last, params, **extra)
    return out, FlatState(states, (), last)


_RUN: dict[str, Callable[..., Any]] = {
    "direct": _direct,
    "each": _each,
    "individual": _individual,
    "second": _second,
}
