"""Attention bias by the distance between two tokens, in buckets that widen."""

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_INIT = nn.initializers.normal(0.02)


def distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance 0 ... `max_distance`; farther ones are in the last.

    The first half are of one distance each, the others grow exponentially.

    Args:
      num_buckets: N.
      max_distance: from which on distances share the last bucket.

    Returns:
      [max_distance + 1] int32.

    Raises:
      ValueError: if there are no buckets of more than one distance.

    >>> distance_buckets(4, 8)
    array([0, 1, 2, 2, 3, 3, 3, 3, 3], dtype=int32)
    """
    exact = num_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            "distance_buckets: num_buckets must be 2 or more and max_distance must "
            f"exceed half of them, found {num_buckets} and {max_distance}"
        )
    distance = np.arange(max_distance + 1)
    # In float32 as the models were trained: a few distances lie on a boundary.
    steps = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(np.log(max_distance / exact))
    far = exact + (steps * np.float32(num_buckets - exact)).astype(np.int32)
    far = np.minimum(far, num_buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


class RelativeBias(nn.Module):
    """One learned number per head and bucket of distances.

    Attributes:
      num_heads: H.
      num_buckets: N, of both directions together where there are two.
      max_distance: from which on distances share a bucket.
      bidirectional: keys behind a query have buckets of their own; otherwise they
        count as distance 0.
      param_dtype: dtype of the table.

    **Follows**: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer", section 2.1.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, query_slots: chex.Array, key_slots: chex.Array) -> chex.Array:
        """Args: [B, L], [B, S] int32. Returns: [B, H, L, S] float32."""
        shape = (self.num_buckets, self.num_heads)
        table = self.param("embedding", _INIT, shape, self.param_dtype)
        size = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        distance = query_slots[:, :, None] - key_slots[:, None, :]
        far = jnp.abs(distance) if self.bidirectional else jnp.maximum(distance, 0)
        buckets = jnp.asarray(distance_buckets(size, self.max_distance))
        found = buckets[jnp.minimum(far, self.max_distance)]
        if self.bidirectional:
            found = found + jnp.where(distance < 0, size, 0)
        return jnp.moveaxis(table.astype(jnp.float32)[found], -1, 1)
