"""Exact order statistics of magnitudes, without sorting and without flattening.

The question is always "which k entries are the largest by magnitude", of one array, of
each row of an array, or of a whole tree taken as one long vector. The answer is a
`Cutoff`: the bit pattern of the k-th largest magnitude and, for the entries that equal
it, how far along the array the kept ones go. Membership is then one elementwise
comparison, which fuses with whatever reads the entries, and shards like them.

Magnitudes are compared as unsigned integers: the bit patterns of |x| order as |x| does,
also for denormal numbers, which a comparison of floats may flush to zero. Every result
is exact, and the same on every platform and for every sharding.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import _selection, _wide
from mtl_jax._apart import apart
from mtl_jax._cutoff import Cutoff, magnitude_bits, reaches, settled
from mtl_jax._wide import Wide

__all__ = [
    "Cutoff",
    "magnitude_bits",
    "reaches",
    "settled",
    "task_top_cutoffs",
    "top_cutoff",
    "top_mask",
    "tree_top_cutoff",
    "tree_top_mask",
]


def _as_count(k: Any, length: int, shape: tuple[int, ...]) -> Wide:
    if isinstance(k, int):
        found = _wide.wide(min(max(k, 0), length))
    else:
        k = jnp.asarray(k)
        top = min(length, int(jnp.iinfo(k.dtype).max))
        found = _wide.wide(jnp.clip(k, 0, top))
    return jax.tree.map(lambda word: jnp.broadcast_to(word, shape), found)


def _tree_cutoffs(tree: Any, k: Any, lines: _selection.Lines, zero_ties: bool) -> Any:
    """Tree of `Cutoff`s with one value per line, [T] or [1]."""
    leaves, treedef = jax.tree.flatten(tree)
    num = leaves[0].shape[0] if leaves and lines == "tasks" else 1
    filled = [x for x in leaves if x.size]
    total = sum(x.size for x in leaves) // num
    k = _as_count(k, total, (num,))
    none = Cutoff(jnp.zeros_like(k.low), jnp.zeros_like(k.low))
    if not filled:
        return treedef.unflatten([none for _ in leaves])
    bisect = functools.partial(_selection.bisect, lines=lines)
    # The histograms have bins of 32 bits.
    radix = (
        functools.partial(_selection.radix, lines=lines)
        if total <= _wide.SPAN
        else bisect
    )
    if any(isinstance(x, jax.core.Tracer) for x in [*k, *filled]):
        edge = jax.lax.platform_dependent(filled, k, cpu=radix, default=bisect)
    else:
        edge = (radix if jax.default_backend() == "cpu" else bisect)(filled, k)
    cutoffs = []
    for i, x in enumerate(leaves):
        cutoff = none
        if x.size:
            own = apart(i, edge)
            cutoff, need = _selection.cutoff_of(x, own, lines, zero_ties)
            edge = edge._replace(need=need)
        cutoffs.append(cutoff)
    return treedef.unflatten(cutoffs)


def task_top_cutoffs(taus: Any, k: Any, *, zero_ties: bool = True) -> Any:
    """The cutoff of each task's whole tree taken as one vector, in leaf order.

    Counts are summed over leaves and over shards; nothing is concatenated, gathered or
    sorted. Outside `jit` the leaves are read one program each, so that leaves of one
    shape share a compilation and temporaries never add up.

    Args:
      taus: float leaves [T, ...] of at most 32 bits, dtypes may differ.
      k: how many entries each task keeps, clipped to [0, n]; scalar or [T].
      zero_ties: False saves the search among equal zeros and keeps all or none of
        them, for callers to whom a kept zero and a dropped one are the same.

    Returns:
      Tree like `taus` with a `Cutoff` of [T] arrays for every leaf.
    """
    return _tree_cutoffs(taus, k, "tasks", zero_ties)


def top_cutoff(
    x: jax.Array, k: Any, *, rows: bool = False, zero_ties: bool = True
) -> Cutoff:
    """The cutoff that keeps the k entries of largest magnitude; first among equals.

    Args:
      x: float array [...] of at most 32 bits.
      k: how many to keep, clipped to [0, n]; an int or an integer scalar array.
      rows: keep k of every row (the last axis) instead of k of the array.
      zero_ties: False saves the search among equal zeros and keeps all or none of
        them, for callers to whom a kept zero and a dropped one are the same.

    Returns:
      A `Cutoff`, for `reaches`.
    """
    if rows and x.ndim > 0:
        k = _as_count(k, x.shape[-1], (*x.shape[:-1], 1))
        return _selection.cutoff_of(
            x, _selection.bisect([x], k, "rows"), "rows", zero_ties
        )[0]
    return tree_top_cutoff(x, k, zero_ties=zero_ties)


def top_mask(x: jax.Array, k: Any, *, rows: bool = False) -> jax.Array:
    """Marks the k entries of largest magnitude; exactly k, first among equals.

    Args:
      x: float array [...] of at most 32 bits.
      k: how many to keep, clipped to [0, n]; an int or an integer scalar array.
      rows: mark k of every row (the last axis) instead of k of the array.

    Returns:
      bool of the shape of `x`, True = kept.

    >>> top_mask(jnp.array([1.0, -3.0, 3.0, 0.0]), 1).tolist()
    [False, True, False, False]
    """
    if x.size == 0:
        return jnp.zeros(x.shape, bool)
    return reaches(x, top_cutoff(x, k, rows=rows))


def tree_top_cutoff(tree: Any, k: Any, *, zero_ties: bool = True) -> Any:
    """The cutoff of a whole tree taken as one vector, in leaf order.

    Args:
      tree: float leaves [...] of at most 32 bits, dtypes may differ.
      k: how many entries of the whole tree to keep, clipped to [0, n].
      zero_ties: see `top_cutoff`.

    Returns:
      Tree like `tree` with a `Cutoff` for every leaf.
    """
    cutoffs = _tree_cutoffs(tree, k, "whole", zero_ties)
    return jax.tree.map(lambda per_line: per_line[0], cutoffs)


def tree_top_mask(tree: Any, k: Any) -> Any:
    """Marks the k entries of largest magnitude of a whole tree; exactly k.

    Args:
      tree: float leaves [...] of at most 32 bits, dtypes may differ.
      k: how many entries of the whole tree to keep, clipped to [0, n].

    Returns:
      Tree of bools like `tree`; among equals the first by leaf order and index.

    >>> mask = tree_top_mask({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, 2)
    >>> mask["a"].tolist(), mask["b"].tolist()
    ([False, True], [True])
    """
    return jax.tree.map(reaches, tree, tree_top_cutoff(tree, k))
