"""Definition of `weighted_combine` in plain jax.numpy."""

import chex
import jax.numpy as jnp


def weighted_combine(x: chex.Array, weights: chex.Array) -> chex.Array:
    """[M, ...] in x's dtype, of x [T, ...] and weights [M, T]."""
    flat = x.astype(jnp.float32).reshape(x.shape[0], -1)
    out = jnp.einsum(
        "mt,tn->mn", weights.astype(jnp.float32), flat, precision="highest"
    )
    return out.reshape(weights.shape[0], *x.shape[1:]).astype(x.dtype)
