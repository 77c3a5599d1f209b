"""The passes over a chunk: jitted, one program per rule, number of models and dtype.

A chunk is [M, C], the models side by side, padded with zeros to a size that all chunks
of a merge share, so that a program is compiled once. Where there is a base it is the
first row. Arithmetic is in float32; the result is cast once.

Loops over models are written out: they fuse into one read of the chunk. Sums come back
in lanes, for the host to add up in float64.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtl_jax.checkpoints import _draw_programs

Select = Literal["all", "band", "coin", "mask", "chance"]
LANES = 2048
_MAGNITUDE = 0x7FFFFFFF


def _rows(data: jax.Array) -> list[jax.Array]:
    return [data[i].astype(jnp.float32) for i in range(data.shape[0])]


def _deltas(data: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    base, *rest = _rows(data)
    return base, [x - base for x in rest]


def _bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits & jnp.uint32(_MAGNITUDE)


def _sum(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _lanes(x: jax.Array) -> jax.Array:
    """Sums of a chunk, [lanes]."""
    lanes = min(LANES, x.size)
    while x.size % lanes:
        lanes -= 1
    return jnp.sum(x.reshape(-1, lanes), axis=0)


def _all_lanes(parts: list[jax.Array]) -> jax.Array:
    """Sums of many values of a chunk, [n, lanes].

    Eighths are added first, by a program that reads the chunk once for all of them; of
    reductions each reads it again.
    """
    if parts[0].size % 8:
        return jnp.stack([_lanes(x) for x in parts])
    eighths = jnp.stack([_sum(list(x.reshape(8, -1))) for x in parts])
    return jax.vmap(_lanes)(eighths)


@functools.partial(jax.jit, static_argnames="dtype")
def combine(data: jax.Array, weights: jax.Array, *, dtype: Any) -> jax.Array:
    """sum_i weights[i] x_i."""
    rows = _rows(data)
    return _sum([weights[i] * x for i, x in enumerate(rows)]).astype(dtype)


@jax.jit
def magnitudes(data: jax.Array) -> jax.Array:
    """[T, C] uint32, bit patterns of the magnitudes of the task vectors."""
    return jnp.stack([_bits(d) for d in _deltas(data)[1]])


@jax.jit
def classify(values: jax.Array, bounds: jax.Array) -> jax.Array:
    """uint8 [L, K, C]: 0 below a bracket, 1 inside, 2 a common value in it, 3 above.

    Args:
      values: uint32 [L, C].
      bounds: uint32 [L, K, 3], low (inclusive), high (exclusive), and the value.
    """

    def one(row, bound):
        inside = jnp.where(row == bound[2], jnp.uint8(2), jnp.uint8(1))
        inside = jnp.where(row >= bound[0], inside, jnp.uint8(0))
        return jnp.where(row >= bound[1], jnp.uint8(3), inside)

    return jnp.stack(
        [
            jnp.stack([one(values[i], bounds[i, j]) for j in range(bounds.shape[1])])
            for i in range(bounds.shape[0])
        ]
    )


def _banded(x: jax.Array, cuts: jax.Array, index: jax.Array) -> jax.Array:
    """Reaches the cutoff (bits, limit) and does not reach the second."""
    bits = _bits(x)
    low = (bits > cuts[0]) | ((bits == cuts[0]) & (index < cuts[1]))
    high = (bits > cuts[2]) | ((bits == cuts[2]) & (index < cuts[3]))
    return low & ~high


def _kept(select: Select, deltas: list[jax.Array], args: Any) -> list[jax.Array]:
    """The task vectors where they are selected, zero elsewhere."""
    if select == "all":
        return deltas
    length = deltas[0].size
    index = jax.lax.iota(jnp.uint32, length)
    found = []
    for t, x in enumerate(deltas):
        if select == "band":
            keep = _banded(x, args["cuts"][:, t], index)
        elif select == "mask":
            keep = (args["mask"][t // 8] >> (t % 8)) & 1 == 1
        elif select == "coin":
            keep = _draw_programs.tossed(args, t, length)
        else:
            u = _draw_programs.random_bits(args["keys"][t], args["start"], length)
            x = x / args["chance"][t]
            keep = _draw_programs.share(u) < args["chance"][t]
        found.append(jnp.where(keep, x, jnp.float32(0)))
    return found


@functools.partial(jax.jit, static_argnames=("select", "elect", "normalize", "dtype"))
def arithmetic(
    data: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    args: Any,
    *,
    select: Select,
    elect: bool,
    normalize: bool,
    dtype: Any,
) -> jax.Array:
    """Base + scale * sum_t weights[t] kept_t, with signs elected or not.

    Args:
      data: [1 + T, C].
      weights: [2, T]; they multiply the values; and those of the divisor.
      scale: scalar.
      args: what the selection needs.
      select: how entries are selected.
      elect: keep only the sign of the sum, of which zero counts as positive.
      normalize: divide by the weights of those that are left.
      dtype: of the result.
    """
    base, deltas = _deltas(data)
    values = [weights[0, t] * x for t, x in enumerate(_kept(select, deltas, args))]
    total = _sum(values)
    if elect:
        total = _elected(values, total, weights[1], normalize)
    return (base + scale * total).astype(dtype)


def _elected(values, score, weights, normalize):
    up = score >= 0
    agree = [jnp.where(up, v > 0, v < 0) for v in values]
    zero = jnp.float32(0)
    total = _sum([jnp.where(a, v, zero) for a, v in zip(agree, values, strict=True)])
    if not normalize:
        return total
    share = _sum([jnp.where(a, weights[t], zero) for t, a in enumerate(agree)])
    return total / jnp.where(share == 0, jnp.float32(1), share)


@functools.partial(jax.jit, static_argnames="select")
def norms(data: jax.Array, args: Any, *, select: Select) -> jax.Array:
    """[T, 2, lanes], sums of |tau| and of |tau| where it is selected."""
    _, deltas = _deltas(data)
    pairs = zip(deltas, _kept(select, deltas, args), strict=True)
    sums = _all_lanes([jnp.abs(x) for pair in pairs for x in pair])
    return sums.reshape(len(deltas), 2, -1)


@functools.partial(jax.jit, static_argnames="based")
def gram(data: jax.Array, *, based: bool) -> jax.Array:
    """[pairs, lanes], inner products of the first row and the differences to it.

    Differences of models that are near each other are exact, and from them angles come
    out to full precision. Pairs (i, j), i <= j, in row-major order.

    Args:
      data: [M, C].
      based: leave out the first row itself, of which only differences count.
    """
    first, rest = _deltas(data)
    rows = rest if based else [first, *rest]
    return jnp.stack(
        [
            _lanes(rows[i] * rows[j])
            for i in range(len(rows))
            for j in range(i, len(rows))
        ]
    )


def _variance(deltas: list[jax.Array]) -> jax.Array:
    """Over models; exactly zero where they are equal."""
    count = jnp.float32(len(deltas))
    mean = _sum(deltas) / count
    square = _sum([jnp.square(d - mean) for d in deltas]) / count
    equal = functools.reduce(jnp.logical_and, [d == deltas[0] for d in deltas])
    return jnp.where(equal, jnp.float32(0), square)


@jax.jit
def variances(data: jax.Array) -> jax.Array:
    """[1, C] uint32, bit patterns of the variance over models."""
    return _bits(_variance(_deltas(data)[1]))[None]


def _chosen(deltas: list[jax.Array], cut: jax.Array | None) -> list[jax.Array]:
    if cut is None:
        return deltas
    bits = _bits(_variance(deltas))
    index = jax.lax.iota(jnp.uint32, bits.size)
    keep = (bits > cut[0]) | ((bits == cut[0]) & (index < cut[1]))
    keep &= bits > 0
    return [jnp.where(keep, d, jnp.float32(0)) for d in deltas]


@jax.jit
def squares(data: jax.Array, cut: jax.Array | None) -> jax.Array:
    """[T, lanes], sums of squares where the variance reaches the cutoff."""
    deltas = _chosen(_deltas(data)[1], cut)
    return _all_lanes([jnp.square(d) for d in deltas])


@functools.partial(jax.jit, static_argnames="dtype")
def sce(
    data: jax.Array, weights: jax.Array, cut: jax.Array | None, *, dtype: Any
) -> jax.Array:
    """Base + mean of the chosen task vectors that have the sign of their sum."""
    base, deltas = _deltas(data)
    deltas = _chosen(deltas, cut)
    up = _sum(deltas) >= 0
    zero = jnp.float32(0)
    agree = [jnp.where(up, d > 0, d < 0) for d in deltas]
    shares = [jnp.where(a, weights[t], zero) for t, a in enumerate(agree)]
    total = _sum([s * d for s, d in zip(shares, deltas, strict=True)])
    return (base + total / jnp.maximum(_sum(shares), jnp.float32(1e-6))).astype(dtype)


def _changed(deltas: list[jax.Array], epsilon: jax.Array):
    moved = [jnp.abs(d) > epsilon for d in deltas]
    return moved, _sum([m.astype(jnp.float32) for m in moved])


@jax.jit
def overlaps(data: jax.Array, epsilon: jax.Array) -> jax.Array:
    """[T, 2, lanes], how many changed entries others changed too, and none else."""
    moved, count = _changed(_deltas(data)[1], epsilon)
    kinds = [m & kind for m in moved for kind in (count > 1, count == 1)]
    sums = _all_lanes([m.astype(jnp.float32) for m in kinds])
    return sums.reshape(len(moved), 2, -1)


@functools.partial(jax.jit, static_argnames="dtype")
def ram(
    data: jax.Array, boost: jax.Array, epsilon: jax.Array, *, dtype: Any
) -> jax.Array:
    """Base + mean over the models that changed an entry; boosted where it is one."""
    base, deltas = _deltas(data)
    moved, count = _changed(deltas, epsilon)
    single, zero = count == 1, jnp.float32(0)
    total = _sum(
        [
            jnp.where(m, jnp.where(single, boost[t], jnp.float32(1)) * d, zero)
            for t, (m, d) in enumerate(zip(moved, deltas, strict=True))
        ]
    )
    return (base + total / jnp.maximum(count, jnp.float32(1))).astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def magmax(
    data: jax.Array, weights: jax.Array, scale: jax.Array, *, dtype: Any
) -> jax.Array:
    """Base + the largest of the weighted task vectors, entry by entry."""
    base, deltas = _deltas(data)

    def larger(best, value):
        return jnp.where(jnp.abs(value) >= jnp.abs(best), value, best)

    best = functools.reduce(larger, [weights[t] * d for t, d in enumerate(deltas)])
    return (base + scale * best).astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def nearswap(data: jax.Array, t: jax.Array, *, dtype: Any) -> jax.Array:
    """From the base to the other model by min(1, t / |difference|)."""
    base, (delta,) = _deltas(data)
    share = jnp.minimum(t / jnp.maximum(jnp.abs(delta), jnp.float32(1e-6)), 1)
    return (base + share * delta).astype(dtype)
