"""Optimizers whose state holds active entries only."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.transforms.masking._keep import arrays, is_structural, split


class CompactState(NamedTuple):
    """State of the inner transformation on active entries, and where these are.

    Attributes:
      inner: state for a list with one [k] or whole leaf per leaf of the parameters.
      index: int32 [k] per elementwise leaf, sorted; None for structural ones.
    """

    inner: Any
    index: list[chex.Array | None]


def _indices(name: str, mask: chex.ArrayTree) -> list[chex.Array | None]:
    out = []
    for leaf in arrays(name, mask):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"{name}: the mask is traced; active entries are counted once, on the "
                "host, so build the transformation outside jit"
            )
        if leaf is not None and leaf.size > np.iinfo(np.int32).max:
            raise ValueError(
                f"{name}: a leaf of {leaf.size} entries needs int64 indices"
            )
        index = None if leaf is None else np.flatnonzero(np.asarray(leaf))
        out.append(None if index is None else jnp.asarray(index, jnp.int32))
    return out


def _gather(name, mask, index, full):
    """The list of active parts, one per leaf of `full`; inactive leaves are empty."""
    out = []
    for decision, idx, subs in zip(
        jax.tree.leaves(mask), index, split(name, mask, full), strict=True
    ):
        if idx is not None:
            out += [
                x.reshape(-1)
                .at[idx]
                .get(
                    indices_are_sorted=True,
                    unique_indices=True,
                    mode="promise_in_bounds",
                )
                for x in subs
            ]
        elif is_structural(decision):
            out += subs if decision else [jnp.zeros(0, x.dtype) for x in subs]
    return out


def _per_leaf(name, mask, index, full):
    """(index or None, active) for every leaf of `full`."""
    for decision, idx, subs in zip(
        jax.tree.leaves(mask), index, split(name, mask, full), strict=True
    ):
        for _ in subs:
            yield idx, (True if idx is not None else bool(decision))


def _scatter(name, mask, index, parts, full):
    """Dense updates from active parts, minus zero elsewhere."""
    out = []
    where = _per_leaf(name, mask, index, full)
    for (idx, active), part, x in zip(where, parts, jax.tree.leaves(full), strict=True):
        if idx is None:
            out.append(part if active else jnp.full_like(x, -0.0))
            continue
        flat = (
            jnp.full(x.size, -0.0, part.dtype)
            .at[idx]
            .set(
                part,
                indices_are_sorted=True,
                unique_indices=True,
                mode="promise_in_bounds",
            )
        )
        out.append(flat.reshape(x.shape))
    return jax.tree.structure(full).unflatten(out)


def _add(name, mask, index, parts, params):
    """Parameters with the active entries moved, in place where buffers are donated."""
    out = []
    where = _per_leaf(name, mask, index, params)
    for (idx, active), part, x in zip(
        where, parts, jax.tree.leaves(params), strict=True
    ):
        if idx is None:
            out.append((x + part).astype(x.dtype) if active else x)
            continue
        flat = (
            x.reshape(-1)
            .at[idx]
            .add(
                part.astype(x.dtype),
                indices_are_sorted=True,
                unique_indices=True,
                mode="promise_in_bounds",
            )
        )
        out.append(flat.reshape(x.shape))
    return jax.tree.structure(params).unflatten(out)


def compact(
    inner: optax.GradientTransformation, mask: chex.ArrayTree
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on the active entries alone, gathered into short vectors.

    Updates equal those of `wrap` for transformations that act entry by entry (and for
    global-norm clipping); state shrinks to the active entries, at 4 bytes of index
    each. The inner transformation sees a list of vectors, one per leaf, so rules by
    path or by matrix shape do not work inside. It saves memory, not time: the updates
    are dense again; see `compact_step`.

    Args:
      inner: any gradient transformation; extra arguments are passed on.
      mask: concrete, see `keep`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if the mask is traced, not bool, or does not fit the parameters.

    >>> tx = compact(optax.adam(0.1), {"w": jnp.array([True, False, False])})
    >>> state = tx.init({"w": jnp.ones(3)})
    >>> [m.shape for m in state.inner[0].mu]
    [(1,)]
    """
    inner = optax.with_extra_args_support(inner)
    index = _indices("compact", mask)

    def init_fn(params):
        return CompactState(inner.init(_gather("compact", mask, index, params)), index)

    def update_fn(updates, state, params=None, **extra):
        idx = state.index
        parts = _gather("compact", mask, idx, updates)
        near = None if params is None else _gather("compact", mask, idx, params)
        parts, inner_state = inner.update(parts, state.inner, near, **extra)
        dense = _scatter("compact", mask, idx, parts, updates)
        return dense, CompactState(inner_state, idx)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class CompactStep(NamedTuple):
    """An optimizer that moves parameters itself, without dense updates.

    Attributes:
      init: `init(params) -> state`.
      step: `step(grads, state, params, **extra) -> (params, state)`.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def compact_step(
    inner: optax.GradientTransformation, mask: chex.ArrayTree
) -> CompactStep:
    """`compact` and `optax.apply_updates` in one, touching active entries only.

    Jit `step` with `params` and `state` donated: parameters are then moved in place.

    Args:
      inner: any gradient transformation; see `compact`.
      mask: concrete, see `keep`.

    Returns:
      A `CompactStep`.

    Raises:
      ValueError: if the mask is traced, not bool, or does not fit the parameters.

    >>> init, step = compact_step(optax.sgd(0.5), {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.ones(2)}
    >>> step({"w": jnp.ones(2)}, init(params), params)[0]["w"].tolist()
    [0.5, 1.0]
    """
    inner = optax.with_extra_args_support(inner)
    index = _indices("compact_step", mask)

    def init(params):
        near = _gather("compact_step", mask, index, params)
        return CompactState(inner.init(near), index)

    def step(grads, state, params, **extra):
        idx = state.index
        parts = _gather("compact_step", mask, idx, grads)
        near = _gather("compact_step", mask, idx, params)
        parts, inner_state = inner.update(parts, state.inner, near, **extra)
        moved = _add("compact_step", mask, idx, parts, params)
        return moved, CompactState(inner_state, idx)

    return CompactStep(init, step)
