"""Definition of `tall_pack` in plain jax.numpy."""

import functools

import chex
import jax.numpy as jnp

from mtl_jax.kernels.bits import pack_bits


def tall_pack(
    taus: chex.Array, scales: chex.Array, merged: chex.Array | None
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """(merged [n], packed [L, T, ceil(n / 8)], counts [L, n]) of taus [T, n]."""
    taus = taus.astype(jnp.float32)
    if merged is None:
        merged = functools.reduce(jnp.add, taus)
    merged = jnp.asarray(merged, jnp.float32)
    own, others = jnp.abs(taus), jnp.abs(merged[None] - taus)
    packed, counts = [], []
    for scale in scales:
        keep = own > scale * others
        packed.append(pack_bits(keep))
        counts.append(keep.sum(0, dtype=jnp.int8))
    return merged, jnp.stack(packed), jnp.stack(counts)
