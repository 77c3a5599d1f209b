"""Block of an encoder-decoder: pre-norm or post-norm, with or without a memory."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn

from mtl_jax.models.layers.cache import LayerCache
from mtl_jax.models.layers.causal_attention import AttentionContext


class Surroundings(NamedTuple):
    """What all blocks of a stack share.

    Attributes:
      context: of the attention of tokens to themselves.
      cross: of the attention to the memory; None in an encoder.
      memory: [B, S, D]; None in an encoder, and where keys and values are cached.
    """

    context: AttentionContext
    cross: AttentionContext | None = None
    memory: chex.Array | None = None


class EncDecBlock(nn.Module):
    """Attention, attention to the memory, feed-forward layer, each with a residual.

    Each is `x + f(norm(x))`, or `norm(x + f(x))` with `post_norm`.

    Attributes:
      norm: name -> norm.
      attention: name -> `CausalSelfAttention`.
      cross: name -> `CrossAttention`; None in an encoder.
      mlp: name -> feed-forward block.
      post_norm: norm behind the sum.
    """

    norm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    cross: Callable[..., nn.Module] | None
    mlp: Callable[..., nn.Module]
    post_norm: bool

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        shared: Surroundings,
        own: Mapping[str, Any],
        cache: Mapping[str, chex.Array] | None,
        layer: chex.Array | None,
    ) -> tuple[chex.Array, dict[str, chex.Array] | None]:
        """Args: see `run_layers`. Returns: ([B, L, D], the new cache)."""
        new: dict[str, chex.Array] = {}

        def add(name, branch, x):
            """The new x, with what `branch` returns besides written to the cache."""
            norm = self.norm(name=f"norm_{name}")
            y = branch(x if self.post_norm else norm(x))
            return norm(x + y) if self.post_norm else x + y

        def attend(kind, module, *inputs):
            """`module` with the buffers of the cache whose names begin with `kind`."""
            buffers = None
            if cache is not None:
                buffers = LayerCache(cache[f"{kind}key"], cache[f"{kind}value"], layer)
            prefix = own.get(f"{kind}prefix")

            def branch(y):
                out, written = module(y, *inputs, prefix=prefix, cache=buffers)
                if written is not None:
                    new[f"{kind}key"], new[f"{kind}value"] = written[:2]
                return out

            return branch

        attention = self.attention(name="attention")
        x = add("attention", attend("", attention, shared.context), x)
        if self.cross is not None:
            cross = self.cross(name="cross_attention")
            inputs = shared.cross, shared.memory
            x = add("cross_attention", attend("memory_", cross, *inputs), x)
        x = add("mlp", self.mlp(name="mlp"), x)
        return x, None if cache is None else new
