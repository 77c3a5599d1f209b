"""Exact order statistics of magnitudes, without sorting and without flattening.

The question is always "which k entries are the largest by magnitude", of one array, of
each row of an array, or of a whole tree taken as one long vector. The answer is a
`Cutoff`: the bit pattern of the k-th largest magnitude and, for the entries that equal
it, how far along the array the kept ones go. Membership is then one elementwise
comparison, which fuses with whatever reads the entries, and shards like them.

Magnitudes are compared as unsigned integers: the order of the bit patterns of |x| is
the order of |x|, also for denormal numbers, which a comparison of floats may flush to
zero. Every result is exact and the same on every platform and for every sharding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_ALL = 0xFFFFFFFF
_HIGH, _LOW = 1 << 16, 1 << 15


class Cutoff(NamedTuple):
    """The k largest magnitudes: above `bits`, or equal to it at an index below `limit`.

    Attributes:
      bits: uint32, bit pattern of the smallest magnitude kept; [] or, for rows,
        [..., 1].
      limit: uint32 of the shape of `bits`; row-major index in the array (for rows, in
        the row). All ones: every equal entry is kept.
    """

    bits: jax.Array
    limit: jax.Array


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Bit pattern of |x| as float32, an unsigned integer that orders as |x| does.

    Args:
      x: float32, bfloat16, float16 or a narrower float; any shape.

    Returns:
      uint32 of the shape of `x`, below 2^31; comparable across dtypes.

    Raises:
      ValueError: `x` is not floating point, or wider than 32 bits.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        raise ValueError(
            f"magnitude_bits: dtype is {x.dtype}, wanted a float of at most 32 bits"
        )
    if x.dtype == jnp.bfloat16:
        half = jax.lax.bitcast_convert_type(x, jnp.uint16)
        return (half & jnp.uint16(0x7FFF)).astype(jnp.uint32) << 16
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return bits & jnp.uint32(0x7FFFFFFF)


def _index(shape: tuple[int, ...], rows: bool) -> jax.Array:
    """Row-major index of every entry, uint32; an iota, never stored when fused."""
    if not shape:
        return jnp.zeros((), jnp.uint32)
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    if rows:
        return index
    stride = shape[-1]
    for axis in reversed(range(len(shape) - 1)):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def _against(bound: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(bound, like.shape)


def reaches(x: jax.Array, cutoff: Cutoff) -> jax.Array:
    """Membership in a cutoff: True for the entries it keeps.

    Args:
      x: float array [...], the one the cutoff was made from.
      cutoff: of the whole array or of its rows.

    Returns:
      bool of the shape of `x`.
    """
    bits = magnitude_bits(x)
    rows = jnp.ndim(cutoff.bits) > 0
    edge, limit = _against(cutoff.bits, bits), _against(cutoff.limit, bits)
    return (bits > edge) | ((bits == edge) & (_index(x.shape, rows) < limit))


def _count(keep: jax.Array, rows: bool) -> jax.Array:
    if rows:
        return jnp.sum(keep, axis=-1, keepdims=True, dtype=jnp.uint32)
    return jnp.sum(keep, dtype=jnp.uint32)


def _total(leaves: list[jax.Array], rows: bool, test: Any) -> jax.Array:
    """Number of entries over all leaves (or in each row) that pass the test."""
    counts = [_count(test(bits), rows) for bits in leaves]
    return sum(counts[1:], counts[0])


def _bisect(leaves: list[jax.Array], k: jax.Array, rows: bool) -> jax.Array:
    """Largest v such that at least k entries are >= v, bit by bit: 31 counts."""

    def decide(i, v):
        trial = v | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        enough = _total(leaves, rows, lambda bits: bits >= _against(trial, bits)) >= k
        return jnp.where(enough, trial, v)

    return jax.lax.fori_loop(0, 31, decide, jnp.zeros_like(k))


def _last_reaching(histogram: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest bin such that it and those above hold k, and the count above it."""
    total = jnp.cumsum(histogram[::-1], dtype=jnp.uint32)[::-1]
    chosen = jnp.sum(total >= k, dtype=jnp.uint32) - jnp.uint32(1)
    above = jnp.append(total, jnp.uint32(0))[chosen + jnp.uint32(1)]
    return chosen, above


def _radix(leaves: list[jax.Array], k: jax.Array) -> jax.Array:
    """The same v from two histograms, of the high 16 and of the low 15 bits."""

    def histogram(num_bins, place):
        counts = jnp.zeros(num_bins, jnp.uint32)
        for bits in leaves:
            counts = counts.at[place(bits)].add(jnp.uint32(1), mode="drop")
        return counts

    high, above = _last_reaching(histogram(_HIGH, lambda bits: bits >> 15), k)

    def low_bin(bits):
        low = bits & jnp.uint32(_LOW - 1)
        return jnp.where(bits >> 15 == high, low, jnp.uint32(_LOW))

    low, _ = _last_reaching(histogram(_LOW, low_bin), k - above)
    return (high << 15) | low


def _limits(
    leaves: list[jax.Array], edge: jax.Array, need: list[jax.Array], rows: bool
) -> list[jax.Array]:
    """Smallest limits below which each leaf has `need` entries equal to the edge."""

    def decide(i, below):
        step = jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        out = []
        for bits, least, wanted in zip(leaves, below, need, strict=True):
            trial = least | step
            hit = (bits == _against(edge, bits)) & (
                _index(bits.shape, rows) < _against(trial, bits)
            )
            out.append(jnp.where(_count(hit, rows) < wanted, trial, least))
        return out

    below = jax.lax.fori_loop(0, 32, decide, [jnp.zeros_like(n) for n in need])
    return [
        jnp.where(wanted > 0, least + jnp.uint32(1), jnp.uint32(0))
        for least, wanted in zip(below, need, strict=True)
    ]


def _cutoffs(
    arrays: list[jax.Array], k: Any, rows: bool, zero_ties: bool
) -> list[Cutoff]:
    """One cutoff per array, all with the same `bits`, that keep k entries together."""
    leaves = [magnitude_bits(x) for x in arrays]
    length = arrays[0].shape[-1] if rows else sum(x.size for x in arrays)
    if any(x.size > _ALL for x in arrays) or length > _ALL:
        raise ValueError(
            f"order statistics count in 32 bits; {length} entries are more"
        )
    k = jnp.clip(jnp.asarray(k), 0, length).astype(jnp.uint32)
    if rows:
        k = jnp.broadcast_to(k, (*arrays[0].shape[:-1], 1))
        edge = _bisect(leaves, k, rows)
    else:
        edge = jax.lax.platform_dependent(
            k,
            *leaves,
            cpu=lambda k, *leaves: _radix(list(leaves), k),
            default=lambda k, *leaves: _bisect(list(leaves), k, False),
        )
    need = k - _total(leaves, rows, lambda bits: bits > _against(edge, bits))
    equal = [_count(bits == _against(edge, bits), rows) for bits in leaves]
    surplus = (need > 0) & (sum(equal[1:], equal[0]) > need)
    if not zero_ties:
        surplus &= edge > 0

    def whole():
        return [jnp.where(need > 0, jnp.uint32(_ALL), jnp.uint32(0)) for _ in leaves]

    def split():
        shares, before = [], jnp.zeros_like(need)
        for count in equal:
            left = jnp.where(need > before, need - before, jnp.uint32(0))
            shares.append(jnp.minimum(left, count))
            before += count
        return _limits(leaves, edge, shares, rows)

    limits = jax.lax.cond(jnp.any(surplus), split, whole)
    return [Cutoff(edge, limit) for limit in limits]


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
    return _cutoffs([x], k, rows and x.ndim > 0, zero_ties)[0]


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

    Counts are summed over leaves and over shards; nothing is concatenated, gathered
    or sorted.

    Args:
      tree: float leaves [...] of at most 32 bits, dtypes may differ.
      k: how many entries of the whole tree to keep, clipped to [0, n].
      zero_ties: see `top_cutoff`.

    Returns:
      Tree like `tree` with a `Cutoff` for every leaf.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return tree
    return treedef.unflatten(_cutoffs(leaves, k, False, zero_ties))


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
    leaves, treedef = jax.tree.flatten(tree)
    cutoffs = treedef.flatten_up_to(tree_top_cutoff(tree, k))
    return treedef.unflatten(
        [reaches(x, cutoff) for x, cutoff in zip(leaves, cutoffs, strict=True)]
    )
