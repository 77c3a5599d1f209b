"""Definition of `gram` in plain jax.numpy."""

import chex
import jax.numpy as jnp


def gram(x: chex.Array) -> chex.Array:
    """[T, T] float32 of x [T, ...]."""
    x = x.astype(jnp.float32).reshape(x.shape[0], -1)
    return jnp.einsum("in,jn->ij", x, x, precision="highest")
