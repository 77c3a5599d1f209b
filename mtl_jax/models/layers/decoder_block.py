"""Pre-norm block of a decoder."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn

from mtl_jax.models.layers.cache import LayerCache
from mtl_jax.models.layers.causal_attention import AttentionContext


class DecoderBlock(nn.Module):
    """`y = x + attention(norm(x))`, then `y + mlp(norm(y))`.

    Attributes:
      norm: name -> norm.
      attention: name -> `CausalSelfAttention`.
      mlp: name -> feed-forward block or `MixtureOfExperts`.
      post_norms: also norm what both branches put out.
    """

    norm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    post_norms: bool

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        context: AttentionContext,
        own: Mapping[str, Any],
        cache: Mapping[str, chex.Array] | None,
        layer: chex.Array | None,
    ) -> tuple[chex.Array, dict[str, chex.Array] | None]:
        """Args: see `run_layers`. Returns: ([B, L, D], the new cache)."""
        buffers = None
        if cache is not None:
            buffers = LayerCache(cache["key"], cache["value"], layer)
        y, buffers = self.attention(name="attention")(
            self.norm(name="norm_attention")(x),
            context,
            window=own.get("window"),
            prefix=own.get("prefix"),
            cache=buffers,
        )
        x = x + (self.norm(name="norm_attention_out")(y) if self.post_norms else y)
        y = self.norm(name="norm_mlp")(x)
        routing = (own["routing"],) if "routing" in own else ()
        y = self.mlp(name="mlp")(y, *routing)
        x = x + (self.norm(name="norm_mlp_out")(y) if self.post_norms else y)
        if buffers is None:
            return x, None
        return x, {"key": buffers.key, "value": buffers.value}
