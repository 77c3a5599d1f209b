"""One side of an encoder-decoder: positions, blocks and the last norm."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
from jax.typing import DTypeLike

from mtl_jax.models.layers.causal_attention import (
    AttentionContext,
    CausalSelfAttention,
    visible,
)
from mtl_jax.models.layers.cross_attention import CrossAttention
from mtl_jax.models.layers.encdec_block import EncDecBlock, Surroundings
from mtl_jax.models.layers.feed_forward import FeedForward, GatedFeedForward
from mtl_jax.models.layers.norm import LayerNorm, RmsNorm
from mtl_jax.models.layers.relative_bias import RelativeBias
from mtl_jax.models.layers.stack import run_layers

_INIT = nn.initializers.normal(0.02)


class EncDecStack(nn.Module):
    """Blocks over embedded tokens.

    Attributes:
      block: name -> `EncDecBlock`.
      depth: number of blocks.
      norm: name -> norm.
      embedding_norm: norm the embeddings.
      last_norm: norm what the last block puts out.
      relative: name -> `RelativeBias`, one for all blocks; None = none.
      num_positions: how many positions are learned; None = none.
      position_offset: rows of their table in front of position 0.
      keep_mask: compute the masks once, not in every block.
      scan: see `run_stack`.
      remat: see `run_stack`.
      param_dtype: dtype of the parameters.
    """

    block: Callable[..., nn.Module]
    depth: int
    norm: Callable[..., nn.Module]
    embedding_norm: bool
    last_norm: bool
    relative: Callable[..., nn.Module] | None
    num_positions: int | None
    position_offset: int
    keep_mask: bool
    scan: bool
    remat: bool | str
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        positions: chex.Array,
        slots: tuple[chex.Array, chex.Array],
        shared: Surroundings,
        *,
        own: Mapping[str, Any],
        cache: Mapping[str, Any] | None = None,
        collect: bool = False,
    ) -> tuple[chex.Array, dict[str, Any] | None, tuple[chex.Array, ...]]:
        """Runs the stack.

        Args:
          x: [B, L, D], embedded words.
          positions: [B, L] int32.
          slots: where queries and keys stand, [B, L] and [B, S] int32 or of one row.
          shared: see `Surroundings`; masks and bias are added here.
          own: see `run_layers`.
          cache: see `run_layers`.
          collect: also return what enters the first block and leaves each.

        Returns:
          ([B, L, D], the layers of the new cache, hidden states or ()).
        """
        if self.num_positions is not None:
            size = self.num_positions + self.position_offset
            options = {"embedding_init": _INIT, "param_dtype": self.param_dtype}
            table = nn.Embed(size, x.shape[-1], **options, name="position")
            x = x + table(positions + self.position_offset).astype(x.dtype)
        if self.embedding_norm:
            x = self.norm(name="norm_embeddings")(x)
        context = shared.context
        if self.relative is not None:
            context = context._replace(bias=self.relative(name="relative")(*slots))
        shared = shared._replace(
            context=self._masked(context), cross=self._masked(shared.cross)
        )
        embedded = x
        x, layers, hidden = run_layers(
            lambda name: self.block(name=name),
            self.depth,
            x,
            shared,
            own=own,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
            collect=collect,
        )
        if self.last_norm:
            x = self.norm(name="norm")(x)
        return x, layers, (embedded, *hidden) if collect else ()

    def _masked(self, context: AttentionContext | None) -> AttentionContext | None:
        if context is None or not self.keep_mask:
            return context
        return context._replace(mask=visible(context))


def make_stack(module: Any, *, decodes: bool) -> EncDecStack:
    """The decoder of an encoder-decoder, or its encoder, from its options."""
    dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}
    norms = {"rms": RmsNorm, "layer": LayerNorm}
    norm = functools.partial(norms[module.norm], epsilon=module.norm_eps, **dtypes)
    attention = {
        "num_heads": module.num_heads,
        "num_kv_heads": module.num_kv_heads or module.num_heads,
        "head_dim": module.dim_of_head,
        "qkv_bias": module.qkv_bias,
        "out_bias": module.out_bias,
        "scale": module.query_scale,
        "implementation": module.attention,
        **dtypes,
    }
    mlp = functools.partial(
        GatedFeedForward if module.gated else FeedForward,
        module.mlp_dim,
        module.activation,
        use_bias=module.mlp_bias,
        kernel_init=_INIT,
        **dtypes,
    )
    cross = functools.partial(CrossAttention, **attention)
    block = functools.partial(
        EncDecBlock,
        norm=norm,
        attention=functools.partial(CausalSelfAttention, **attention),
        cross=cross if decodes else None,
        mlp=mlp,
        post_norm=module.post_norm,
    )
    relative = functools.partial(
        RelativeBias,
        module.num_heads,
        module.relative_buckets,
        module.relative_distance,
        not decodes,
        module.param_dtype,
    )
    learned = module.position == "learned"
    return EncDecStack(
        block=block,
        depth=module.depth if decodes else module.depth_of_encoder,
        norm=norm,
        embedding_norm=module.embedding_norm,
        last_norm=not module.post_norm,
        relative=None if learned else relative,
        num_positions=module.max_positions if learned else None,
        position_offset=module.position_offset,
        keep_mask=module.attention != "blocked",
        scan=module.scan,
        remat=module.remat,
        param_dtype=module.param_dtype,
    )
