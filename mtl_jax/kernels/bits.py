"""One bit per mask entry: byte `i // 8`, bit `i % 8`, least significant first."""

import chex
import jax
import jax.numpy as jnp


def num_bytes(size: int) -> int:
    """Bytes that hold `size` bits."""
    return -(-size // 8)


def _shifts(ndim: int) -> chex.Array:
    return jnp.arange(8, dtype=jnp.uint8).reshape((1,) * (ndim - 1) + (8,))


def pack_bits(mask: chex.Array) -> chex.Array:
    """Packs the last axis, eight entries to a byte.

    Args:
      mask: bool [..., n].

    Returns:
      uint8 [..., ceil(n / 8)]; unused bits of the last byte are zero.

    >>> pack_bits(jnp.array([True, False, True] + [False] * 7)).tolist()
    [5, 0]
    """
    *lead, size = mask.shape
    pad = num_bytes(size) * 8 - size
    bits = mask.astype(jnp.uint8)
    if pad:
        bits = jnp.pad(bits, [(0, 0)] * len(lead) + [(0, pad)])
    bits = bits.reshape(*lead, num_bytes(size), 8)
    return (bits << _shifts(bits.ndim)).sum(-1, dtype=jnp.uint8)


def unpack_bits(packed: chex.Array, size: int) -> chex.Array:
    """The inverse of `pack_bits`.

    Args:
      packed: uint8 [..., ceil(size / 8)].
      size: number of entries n.

    Returns:
      bool [..., size].

    >>> unpack_bits(jnp.array([5, 0], jnp.uint8), 10)[:4].tolist()
    [True, False, True, False]
    """
    bits = packed[..., None] >> _shifts(packed.ndim + 1)
    bits = (bits & jnp.uint8(1)).astype(bool)
    bits = bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8)
    return jax.lax.slice_in_dim(bits, 0, size, axis=-1)
