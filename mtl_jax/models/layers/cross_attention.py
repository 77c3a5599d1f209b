"""Attention of a decoder to what an encoder put out."""

import chex
import flax.linen as nn

from mtl_jax.models.layers.cache import LayerCache, fill_cache, read_cache
from mtl_jax.models.layers.causal_attention import (
    AttentionContext,
    ProjectedAttention,
)
from mtl_jax.models.layers.prefix import in_front


class CrossAttention(ProjectedAttention):
    """Queries of x, keys and values of a memory.

    Rows of x may be a multiple G of those of the memory: row r then reads memory
    r // G. Keys and values are not repeated; the G rows share a product.
    """

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        context: AttentionContext,
        memory: chex.Array | None,
        *,
        prefix: dict[str, chex.Array] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[chex.Array, LayerCache | None]:
        """Attends over the memory and the prefix.

        Args:
          x: [G B, L, D].
          context: `look_around` of segments [B, G L] and [B, S].
          memory: [B, S, D], or None to read the keys and values in the cache.
          prefix: as in `CausalSelfAttention`, in rows of the memory.
          cache: buffers for keys and values of the memory, or None.

        Returns:
          ([G B, L, D], the cache with the keys and values of the memory).
        """
        query = self._heads("query", x, self.num_heads)
        if memory is not None:
            key = self._heads("key", memory, self.num_kv_heads)
            value = self._heads("value", memory, self.num_kv_heads)
            if cache is not None:
                cache = fill_cache(cache, key, value)
        if cache is not None:
            key, value = (y.astype(query.dtype) for y in read_cache(cache))
        query = query.reshape(*context.query_segments.shape, *query.shape[2:])
        key, value = in_front(prefix, key, value)
        heads = self._attend(query, key, value, context, None)
        return self._project(heads, x.shape), cache
