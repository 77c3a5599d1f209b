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
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

_ALL = 0xFFFFFFFF
_HIGH, _LOW = 1 << 16, 1 << 15
_SLICE = 1 << 15
Lines = Literal["tasks", "whole", "rows"]


class Cutoff(NamedTuple):
    """The k largest magnitudes: above `bits`, or equal to it at an index below `limit`.

    Attributes:
      bits: uint32, bit pattern of the smallest magnitude kept; [] or, for rows, the
        shape of the array with 1 in the place of the axis along which rows run.
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


def _index(shape: tuple[int, ...], axes: Iterable[int]) -> jax.Array:
    """Row-major index over ascending axes; not stored where it fuses."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in axes:
        index *= jnp.uint32(shape[axis])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def reaches(x: jax.Array, cutoff: Cutoff) -> jax.Array:
    """Membership in a cutoff: True for the entries it keeps.

    Args:
      x: float array [...], the one the cutoff was made from.
      cutoff: of the whole array or of its rows.

    Returns:
      bool of the shape of `x`.
    """
    bits = magnitude_bits(x)
    edge = jnp.broadcast_to(cutoff.bits, x.shape)
    limit = jnp.broadcast_to(cutoff.limit, x.shape)
    line = jnp.shape(cutoff.bits) or (1,) * x.ndim
    index = _index(x.shape, [a for a, n in enumerate(x.shape) if n != line[a]])
    return (bits > edge) | ((bits == edge) & (index < limit))


class _Edge(NamedTuple):
    """The k-th largest bits, how many of its equals are wanted and how many exist.

    One of each per *line*. The lines of a task tree are its tasks, [T], which run over
    all its leaves; a whole tree is one line, [1]; the rows of an array are [..., 1].
    """

    bits: jax.Array
    need: jax.Array
    equal: jax.Array


def _by_line(x: jax.Array, lines: Lines) -> jax.Array:
    return x[None] if lines == "whole" else x


def _spread(values: jax.Array, x: jax.Array, rows: bool) -> jax.Array:
    """One value per line, repeated for each entry of the line."""
    if not rows:
        values = values.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.broadcast_to(values, x.shape)


def _count(keep: jax.Array, rows: bool) -> jax.Array:
    if rows:
        return jnp.sum(keep, axis=-1, keepdims=True, dtype=jnp.uint32)
    return jnp.sum(keep, axis=tuple(range(1, keep.ndim)), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=2)
def _bisect(leaves: list[jax.Array], k: jax.Array, lines: Lines) -> _Edge:
    """Largest v such that at least k entries are >= v, bit by bit: 31 counts."""
    rows, leaves = lines == "rows", [_by_line(x, lines) for x in leaves]

    def count(test: Callable[..., jax.Array], v):
        return sum(
            _count(test(magnitude_bits(x), _spread(v, x, rows)), rows) for x in leaves
        )

    def decide(i, v):
        trial = v | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        return jnp.where(count(jnp.greater_equal, trial) >= k, trial, v)

    bits = jax.lax.fori_loop(0, 31, decide, jnp.zeros_like(k))
    return _Edge(bits, k - count(jnp.greater, bits), count(jnp.equal, bits))


def _num_slices(x: jax.Array) -> int:
    """In how many equal slices to read each line of a leaf [T, ...].

    Scatters and counts on a CPU keep their operands in memory, so a whole leaf at once
    costs copies of it, and slices that fit in cache are faster too. Slices of the flat
    view would gather a sharded leaf; but where there is one device nothing is sharded.
    """
    length = math.prod(x.shape[1:])
    least = length // _SLICE
    if least < 2 or jax.device_count() > 1:
        return 1
    return next((s for s in range(least, 64 * least) if length % s == 0), 1)


def _slice(x: jax.Array, line: jax.Array, part: jax.Array, parts: int) -> jax.Array:
    if parts == 1:
        return x[line]
    width = math.prod(x.shape[1:]) // parts
    flat = x.reshape(x.shape[0], -1)
    return jax.lax.dynamic_slice(flat, (line, part * width), (1, width))[0]


@functools.partial(jax.jit, static_argnums=3)
def _tally(
    counts: jax.Array, x: jax.Array, high: jax.Array | None, lines: Lines
) -> jax.Array:
    """Adds a leaf to a histogram [T, bins] of its high, or its low, bits."""
    x = _by_line(x, lines)
    parts, bins = _num_slices(x), counts.shape[1]
    # One flat axis: a scatter with two indices is several times slower.
    nowhere = jnp.uint32(counts.size)

    def step(i, counts):
        line = i // parts
        bits = magnitude_bits(_slice(x, line, i % parts, parts))
        start = line.astype(jnp.uint32) * jnp.uint32(bins)
        if high is None:
            place = start + (bits >> 15)
        else:
            low = start + (bits & jnp.uint32(_LOW - 1))
            place = jnp.where(bits >> 15 == high[line], low, nowhere)
        return counts.at[place].add(jnp.uint32(1), mode="drop")

    flat = jax.lax.fori_loop(0, x.shape[0] * parts, step, counts.reshape(-1))
    return flat.reshape(counts.shape)


@jax.jit
def _choose(counts: jax.Array, k: jax.Array) -> _Edge:
    """Per line the largest bin such that it and those above hold k."""
    total = jnp.cumsum(counts[:, ::-1], axis=1, dtype=jnp.uint32)[:, ::-1]
    chosen = jnp.sum(total >= k[:, None], axis=1, dtype=jnp.uint32) - jnp.uint32(1)
    pick = functools.partial(jnp.take_along_axis, indices=chosen[:, None], axis=1)
    equal = pick(counts)[:, 0]
    return _Edge(chosen, k - (pick(total)[:, 0] - equal), equal)


def _radix(leaves: list[jax.Array], k: jax.Array, lines: Lines) -> _Edge:
    """What `_bisect` finds, from histograms of the high 16 and of the low 15 bits."""
    counts = jnp.zeros((k.size, _HIGH), jnp.uint32)
    for x in leaves:
        counts = _tally(counts, x, None, lines)
    high = _choose(counts, k)
    counts = jnp.zeros((k.size, _LOW), jnp.uint32)
    for x in leaves:
        counts = _tally(counts, x, high.bits, lines)
    low = _choose(counts, high.need)
    return _Edge((high.bits << 15) | low.bits, low.need, low.equal)


def _search(x: jax.Array, edge: _Edge, rows: bool) -> tuple[jax.Array, jax.Array]:
    """Where in each line the last wanted equal is, bit by bit; and the equals."""
    axes = range(x.ndim - 1 if rows else 1, x.ndim)
    length = math.prod(x.shape[a] for a in axes)

    def below(limit):
        hit = magnitude_bits(x) == _spread(edge.bits, x, rows)
        return _count(hit & (_index(x.shape, axes) < _spread(limit, x, rows)), rows)

    def decide(i, least):
        trial = least | (jnp.uint32(1) << (length.bit_length() - 1 - i))
        return jnp.where(below(trial) < edge.need, trial, least)

    equal = below(jnp.full_like(edge.need, _ALL))
    partial = (edge.need > 0) & (edge.need < equal)
    rounds = jnp.where(jnp.any(partial), length.bit_length(), 0).astype(jnp.uint32)
    least = jax.lax.fori_loop(jnp.uint32(0), rounds, decide, jnp.zeros_like(edge.need))
    return least + jnp.uint32(1), equal


def _scan(x: jax.Array, edge: _Edge) -> tuple[jax.Array, jax.Array]:
    """What `_search` finds for tasks, in one pass over the slices of a leaf."""
    parts, num = _num_slices(x), x.shape[0]

    def hits(line, part):
        bits = magnitude_bits(_slice(x, line, part, parts))
        return (bits == edge.bits[line]).reshape(-1)

    def step(i, counts):
        line, part = i // parts, i % parts
        count = jnp.sum(hits(line, part), dtype=jnp.uint32)
        return counts.at[line, part].set(count)

    counts = jnp.zeros((num, parts), jnp.uint32)
    counts = jax.lax.fori_loop(0, num * parts, step, counts)

    def locate(line):
        need = edge.need[line]
        total = jnp.cumsum(counts[line])
        part = jnp.minimum(jnp.sum(total < need), parts - 1)
        rest = need - (total[part] - counts[line, part])
        hit = hits(line, part)
        place = jnp.sum(jnp.cumsum(hit, dtype=jnp.uint32) < rest, dtype=jnp.uint32)
        return part.astype(jnp.uint32) * jnp.uint32(hit.size) + place + jnp.uint32(1)

    return jax.lax.map(locate, jnp.arange(num)), counts.sum(1, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _limit(
    x: jax.Array, edge: _Edge, lines: Lines, zero_ties: bool
) -> tuple[jax.Array, jax.Array]:
    """The limit of one leaf, and how many equals the leaves after it still owe."""
    x, rows = _by_line(x, lines), lines == "rows"
    surplus = (edge.need > 0) & (edge.equal > edge.need)
    if not zero_ties:
        surplus &= edge.bits > 0

    def split():
        whole = rows or jax.device_count() > 1
        place, equal = _search(x, edge, rows) if whole else _scan(x, edge)
        limit = jnp.where(edge.need < equal, place, jnp.uint32(_ALL))
        return limit, edge.need - jnp.minimum(edge.need, equal)

    def all_or_none():
        return jnp.full_like(edge.need, _ALL), edge.need

    limit, need = jax.lax.cond(jnp.any(surplus), split, all_or_none)
    return jnp.where(edge.need > 0, limit, jnp.uint32(0)), need


def _as_count(k: Any, length: int, shape: tuple[int, ...]) -> jax.Array:
    if length > _ALL:
        raise ValueError(f"order statistics count in 32 bits, not {length} entries")
    return jnp.broadcast_to(jnp.clip(k, 0, length).astype(jnp.uint32), shape)


def _tree_cutoffs(tree: Any, k: Any, lines: Lines, zero_ties: bool) -> Any:
    """Tree of `Cutoff`s with one value per line, [T] or [1]."""
    leaves, treedef = jax.tree.flatten(tree)
    num = leaves[0].shape[0] if leaves and lines == "tasks" else 1
    filled = [x for x in leaves if x.size]
    k = _as_count(k, sum(x.size for x in leaves) // num, (num,))
    if not filled:
        none = Cutoff(jnp.zeros_like(k), jnp.zeros_like(k))
        return treedef.unflatten([none for _ in leaves])
    radix, bisect = (lambda xs, k, f=f: f(xs, k, lines) for f in (_radix, _bisect))
    if any(isinstance(x, jax.core.Tracer) for x in [k, *filled]):
        edge = jax.lax.platform_dependent(filled, k, cpu=radix, default=bisect)
    else:
        edge = (radix if jax.default_backend() == "cpu" else bisect)(filled, k)
    cutoffs = []
    for x in leaves:
        limit = jnp.zeros_like(k)
        if x.size:
            limit, need = _limit(x, edge, lines, zero_ties)
            edge = edge._replace(need=need)
        cutoffs.append(Cutoff(edge.bits, limit))
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
        edge = _bisect([x], k, "rows")
        return Cutoff(edge.bits, _limit(x, edge, "rows", zero_ties)[0])
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
