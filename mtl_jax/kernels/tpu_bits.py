"""Public bit order <-> bit planes, inside a Pallas TPU kernel.

A group is 4,096 consecutive entries: 512 packed bytes, and 32 rows of 128 lanes once
expanded. Eight groups fill one vector register of packed bits, so the kernels work on
tiles of 32,768 entries: packed uint8 [32, 128], expanded [256, 128].

The *plane* form of a group is one uint32 per lane whose bit s belongs to row s, so
expanding is a shift by the row number. Seen as an array of bits, both forms hold entry
e = e11 ... e0 of a group, at

  packed, four bytes to a word:  lane e9 ... e3,  bit e11 e10 e2 e1 e0
  plane:                         lane e6 ... e0,  bit e11 e10 e9 e8 e7

so three exchanges of a lane bit with a word bit and one permutation of lanes convert
the one into the other, at a few operations per register of 32,768 entries.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES = 128
GROUP = 32 * LANES
GROUPS = 8
TILE_ROWS = GROUPS * 32
TILE_BYTES = 32

_EXCHANGES = ((6, 2), (5, 1), (4, 0))  # lane bit, word bit


def _word_bit_mask(bit: int) -> int:
    return sum(1 << i for i in range(32) if i >> bit & 1)


def _exchange(words: chex.Array, lane_bit: int, word_bit: int) -> chex.Array:
    """Exchanges one bit of the lane number with one bit of the bit number."""
    step, shift = 1 << lane_bit, np.uint32(1 << word_bit)
    high = np.uint32(_word_bit_mask(word_bit))
    low = np.uint32(~_word_bit_mask(word_bit) & 0xFFFFFFFF)
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
    above = pltpu.roll(words, LANES - step, 1)
    below = pltpu.roll(words, step, 1)
    return jnp.where(
        (lane >> lane_bit) & 1 == 1,
        (words & high) | ((below & high) >> shift),
        (words & low) | ((above & low) << shift),
    )


def planes_from_packed(packed: chex.Array) -> chex.Array:
    """Packed bytes uint8 [32, 128] -> planes uint32 [8, 128]."""
    words = pltpu.bitcast(packed, jnp.uint32)
    for lane_bit, word_bit in _EXCHANGES:
        words = _exchange(words, lane_bit, word_bit)
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
    return jnp.take_along_axis(words, ((lane & 7) << 4) | (lane >> 3), axis=1)


def packed_from_planes(planes: chex.Array) -> chex.Array:
    """Planes uint32 [8, 128] -> packed bytes uint8 [32, 128]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, planes.shape, 1)
    words = jnp.take_along_axis(planes, ((lane & 15) << 3) | (lane >> 4), axis=1)
    for lane_bit, word_bit in _EXCHANGES:
        words = _exchange(words, lane_bit, word_bit)
    return pltpu.bitcast(words, jnp.uint8)


def _row(shape: tuple[int, int]) -> chex.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.uint32)


def expand(planes: chex.Array, group: int) -> chex.Array:
    """Bits of one group as bool [32, 128]."""
    shape = (32, LANES)
    words = jnp.broadcast_to(planes[group : group + 1, :], shape)
    return (words >> _row(shape)) & np.uint32(1) == np.uint32(1)


def collect(mask: chex.Array) -> chex.Array:
    """The plane uint32 [1, 128] of a group given as bool [32, 128]."""
    bits = mask.astype(jnp.int32) << jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0)
    plane = bits.sum(axis=0, keepdims=True, dtype=jnp.int32)
    return jax.lax.bitcast_convert_type(plane, jnp.uint32)
