"""Definition of `masked_restore` in plain jax.numpy."""

import chex
import jax.numpy as jnp

from mtl_jax.kernels.bits import unpack_bits


def masked_restore(
    base: chex.Array, delta: chex.Array, packed: chex.Array, scale: chex.Array
) -> chex.Array:
    """`base + scale * where(bit, delta, 0)`; see the public function."""
    dtype = jnp.float64 if base.dtype == jnp.float64 else jnp.float32
    keep = unpack_bits(packed, base.size).reshape(base.shape)
    step = jnp.where(keep, delta.astype(dtype), jnp.zeros((), dtype))
    return (base.astype(dtype) + scale.astype(dtype) * step).astype(base.dtype)
