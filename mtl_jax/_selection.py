"""The k-th largest magnitude and where its last equal is, by counting alone.

Two ways to the same bits: histograms of their upper and lower halves, which are best on
CPUs, and bisection on counts, which shards and needs nothing but reductions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import _wide
from mtl_jax._apart import apart
from mtl_jax._cutoff import Cutoff, index, magnitude_bits
from mtl_jax._wide import Wide

_ALL = 0xFFFFFFFF
_HIGH, _LOW = 1 << 16, 1 << 15
_SLICE = 1 << 15
Lines = Literal["tasks", "whole", "rows"]


class Edge(NamedTuple):
    """The k-th largest bits, how many of its equals are wanted and how many exist.

    One of each per *line*. The lines of a task tree are its tasks, [T], which run over
    all its leaves; a whole tree is one line, [1]; the rows of an array are [..., 1].
    """

    bits: jax.Array
    need: Wide
    equal: Wide


def _by_line(x: jax.Array, lines: Lines) -> jax.Array:
    return x[None] if lines == "whole" else x


def _spread(values: jax.Array, x: jax.Array, rows: bool) -> jax.Array:
    """One value per line, repeated for each entry of the line."""
    if not rows:
        values = values.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.broadcast_to(values, x.shape)


def _count(keep: jax.Array, rows: bool) -> Wide:
    return _wide.count(keep, _axes(keep, rows), keepdims=rows)


def _axes(x: jax.Array, rows: bool) -> range:
    """The axes along which lines run."""
    return range(x.ndim - 1 if rows else 1, x.ndim)


@functools.partial(jax.jit, static_argnums=2)
def bisect(leaves: list[jax.Array], k: Wide, lines: Lines) -> Edge:
    """Largest v such that at least k entries are >= v, bit by bit: 31 counts."""
    rows, leaves = lines == "rows", [_by_line(x, lines) for x in leaves]

    def count(test: Callable[..., jax.Array], v):
        found = [
            _count(test(magnitude_bits(x), _spread(apart(i, v), x, rows)), rows)
            for i, x in enumerate(leaves)
        ]
        return functools.reduce(_wide.add, found)

    def decide(i, v):
        trial = v | (jnp.uint32(1 << 30) >> i.astype(jnp.uint32))
        short = _wide.less(count(jnp.greater_equal, trial), k)
        return jnp.where(short, v, trial)

    bits = jax.lax.fori_loop(0, 31, decide, jnp.zeros_like(k.low))
    above = count(jnp.greater, bits)
    return Edge(bits, _wide.subtract(k, above), count(jnp.equal, bits))


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
def _choose(counts: jax.Array, k: Wide) -> Edge:
    """Per line the largest bin such that it and those above hold k."""
    wanted = _wide.narrow(k)
    total = jnp.cumsum(counts[:, ::-1], axis=1, dtype=jnp.uint32)[:, ::-1]
    chosen = jnp.sum(total >= wanted[:, None], axis=1, dtype=jnp.uint32) - jnp.uint32(1)
    pick = functools.partial(jnp.take_along_axis, indices=chosen[:, None], axis=1)
    equal = pick(counts)[:, 0]
    need = wanted - (pick(total)[:, 0] - equal)
    return Edge(chosen, _wide.wide(need), _wide.wide(equal))


def radix(leaves: list[jax.Array], k: Wide, lines: Lines) -> Edge:
    """What `bisect` finds, from histograms of the high 16 and of the low 15 bits."""
    counts = jnp.zeros((k.low.size, _HIGH), jnp.uint32)
    for x in leaves:
        counts = _tally(counts, x, None, lines)
    high = _choose(counts, k)
    counts = jnp.zeros((k.low.size, _LOW), jnp.uint32)
    for x in leaves:
        counts = _tally(counts, x, high.bits, lines)
    low = _choose(counts, high.need)
    return Edge((high.bits << 15) | low.bits, low.need, low.equal)


def _search(x: jax.Array, edge: Edge, rows: bool) -> tuple[jax.Array, Any, Wide]:
    """Where in each line the last wanted equal is, bit by bit; and the equals.

    Returns:
      Index past it over the last axes, index of its block over those before (None:
      there are none), and the number of equals.
    """
    outer, inner = _wide.split(x.shape, _axes(x, rows))
    hit = magnitude_bits(x) == _spread(edge.bits, x, rows)
    equal = _count(hit, rows)
    partial = _wide.positive(edge.need) & _wide.less(edge.need, equal)

    def last(axes, among, need):
        """Largest index over some axes with fewer than `need` before it."""
        bits = math.prod(x.shape[a] for a in axes).bit_length()

        def decide(i, least):
            trial = least | (jnp.uint32(1) << (bits - 1 - i))
            before = among & (index(x.shape, axes) < _spread(trial, x, rows))
            return jnp.where(_wide.less(_count(before, rows), need), trial, least)

        rounds = jnp.where(jnp.any(partial), bits, 0).astype(jnp.uint32)
        zero = jnp.zeros_like(edge.bits)
        return jax.lax.fori_loop(jnp.uint32(0), rounds, decide, zero)

    if not outer:
        return last(inner, hit, edge.need) + jnp.uint32(1), None, equal
    block = last(outer, hit, edge.need)
    place = index(x.shape, outer)
    before = _count(hit & (place < _spread(block, x, rows)), rows)
    own = hit & (place == _spread(block, x, rows))
    need = _wide.subtract(edge.need, _wide.minimum(before, edge.need))
    return last(inner, own, need) + jnp.uint32(1), block, equal


def _scan(x: jax.Array, edge: Edge) -> tuple[jax.Array, Any, Wide]:
    """What `_search` finds for tasks, in one pass over the slices of a leaf."""
    parts, num = _num_slices(x), x.shape[0]
    wanted = _wide.narrow(edge.need)

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
        need = wanted[line]
        total = jnp.cumsum(counts[line])
        part = jnp.minimum(jnp.sum(total < need), parts - 1)
        rest = need - (total[part] - counts[line, part])
        hit = hits(line, part)
        place = jnp.sum(jnp.cumsum(hit, dtype=jnp.uint32) < rest, dtype=jnp.uint32)
        return part.astype(jnp.uint32) * jnp.uint32(hit.size) + place + jnp.uint32(1)

    equal = _wide.wide(counts.sum(1, dtype=jnp.uint32))
    return jax.lax.map(locate, jnp.arange(num)), None, equal


@functools.partial(jax.jit, static_argnums=(2, 3))
def cutoff_of(
    x: jax.Array, edge: Edge, lines: Lines, zero_ties: bool
) -> tuple[Cutoff, Wide]:
    """The cutoff of one leaf, and how many equals the leaves after it still owe."""
    x, rows = _by_line(x, lines), lines == "rows"
    surplus = _wide.positive(edge.need) & _wide.less(edge.need, edge.equal)
    if not zero_ties:
        surplus &= edge.bits > 0
    full = jnp.full_like(edge.bits, _ALL)
    large = bool(_wide.split(x.shape, _axes(x, rows))[0])

    def by_search():
        return _search(x, edge, rows)

    # Slices of the flat leaf would gather one that is sharded, which on the CPU takes
    # several devices; a program for other platforms may be for more than are here.
    flat = not (rows or large or jax.device_count() > 1)
    by_slices = functools.partial(_scan, x, edge) if flat else by_search

    def split():
        place, block, equal = jax.lax.platform_dependent(
            cpu=by_slices, default=by_search
        )
        part = _wide.less(edge.need, equal)
        limits = [
            None if p is None else jnp.where(part, p, full) for p in (place, block)
        ]
        return *limits, _wide.subtract(edge.need, _wide.minimum(edge.need, equal))

    def all_or_none():
        return full, full if large else None, edge.need

    limit, block, need = jax.lax.cond(jnp.any(surplus), split, all_or_none)
    some = _wide.positive(edge.need)
    limit = jnp.where(some, limit, jnp.uint32(0))
    if block is not None:
        block = jnp.where(some, block, jnp.uint32(0))
    return Cutoff(edge.bits, limit, block), need
