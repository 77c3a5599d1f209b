"""Token features to one feature vector."""

import chex
import jax.numpy as jnp


def mean_pool(hidden: chex.Array, mask: chex.Array) -> chex.Array:
    """Mean over the active positions: `sum_l m_l h_l / max(1, sum_l m_l)`.

    Args:
      hidden: [B, L, D] floating point.
      mask: [B, L] bool or integer, non-zero = active.

    Returns:
      [B, D] in the dtype of `hidden`, accumulated in float32; zero for a row
      without an active position.

    Raises:
      ValueError: if the shapes disagree.

    >>> import jax.numpy as jnp
    >>> mean_pool(jnp.array([[[2.0], [4.0], [9.0]]]), jnp.array([[1, 1, 0]]))
    Array([[3.]], dtype=float32)
    """
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mean_pool: wanted hidden [B, L, D] and mask [B, L], found "
            f"{hidden.shape} and {mask.shape}"
        )
    active = mask.astype(bool).astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * active, axis=1)
    count = jnp.maximum(jnp.sum(active, axis=1), 1.0)
    return (total / count).astype(hidden.dtype)
