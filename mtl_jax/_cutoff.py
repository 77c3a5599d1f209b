"""Membership among the largest magnitudes: bit patterns, indices, cutoffs."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import _wide


class Cutoff(NamedTuple):
    """The k largest magnitudes: above `bits`, or equal to it at an index below `limit`.

    Attributes:
      bits: uint32, bit pattern of the smallest magnitude kept; [] or, for rows, the
        shape of the array with 1 in the place of the axis along which rows run.
      limit: uint32 of the shape of `bits`; row-major index in the array (for rows, in
        the row). All ones: every equal entry is kept.
      block: of arrays of 2^32 entries and more, whose index `limit` counts over their
        last axes only: row-major index over the axes before, uint32 of the shape of
        `bits`; None for others.
    """

    bits: jax.Array
    limit: jax.Array
    block: jax.Array | None = None


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


def index(shape: tuple[int, ...], axes: Iterable[int]) -> jax.Array:
    """Row-major index over ascending axes; not stored where it fuses."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in axes:
        index *= jnp.uint32(shape[axis])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def settled(scores: jax.Array) -> jax.Array:
    """The same scores, which no compiler computes again where they are compared.

    A score that is computed a second time beside its cutoff may round to the other side
    of it, and then the count of what reaches the cutoff is wrong. So scores that are
    computed in a program pass through here, those that are read from memory need not.
    Past a branch nothing is fused, while a barrier does not hold on CPUs. Under `vmap`
    a branch is a selection, and this gives no promise.

    Args:
      scores: float or integer array of any shape.

    Returns:
      `scores`, bit for bit; where nothing is traced, the array itself.

    >>> settled(jnp.array([1.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    if not isinstance(scores, jax.core.Tracer):
        return scores
    return jax.lax.cond(jnp.any(scores != 0), _same, jnp.zeros_like, scores)


def _same(x: jax.Array) -> jax.Array:
    return x


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
    axes = [a for a, n in enumerate(x.shape) if n != line[a]]
    outer, inner = _wide.split(x.shape, axes)
    before = index(x.shape, inner) < limit
    if cutoff.block is not None:
        block = jnp.broadcast_to(cutoff.block, x.shape)
        place = index(x.shape, outer)
        before = (place < block) | ((place == block) & before)
    return (bits > edge) | ((bits == edge) & before)
