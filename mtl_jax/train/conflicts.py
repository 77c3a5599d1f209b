"""How much the task gradients of a step are in each other's way."""

import chex
import jax.numpy as jnp


def cosines(gram: chex.Array) -> chex.Array:
    """Cosines between task gradients, `G[i, j] / sqrt(G[i, i] G[j, j])`.

    Args:
      gram: [T, T] inner products.

    Returns:
      [T, T] float32 with a diagonal of ones; 0 beside a task without a gradient.

    >>> cosines(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = jnp.sqrt(jnp.diag(gram))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    # One factor after the other: their product may leave the range of float32.
    found = gram * inverse[:, None] * inverse[None]
    eye = jnp.eye(gram.shape[0], dtype=bool)
    return jnp.where(eye, 1, jnp.clip(found, -1, 1))


def conflict_metrics(gram: chex.Array) -> dict[str, chex.Array]:
    """Two scalars that say how much tasks conflict.

    Args:
      gram: [T, T] inner products.

    Returns:
      `min_cosine`, the smallest cosine of a pair (1 where there is one task), and
      `conflict_rate`, the fraction of pairs whose cosine is negative (0 there).
    """
    count = gram.shape[0]
    if count == 1:
        return {"min_cosine": jnp.ones(()), "conflict_rate": jnp.zeros(())}
    found = cosines(gram)[jnp.triu_indices(count, 1)]
    return {
        "min_cosine": jnp.min(found),
        "conflict_rate": jnp.mean((found < 0).astype(jnp.float32)),
    }
