"""Encoder-decoder language models: one module whose options are data."""

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.backbones.encdec_inputs import (
    Prefix,
    check_options,
    check_rows,
    check_tokens,
    memory_segments,
    own_inputs,
)
from mtl_jax.models.backbones.encdec_stack import make_stack
from mtl_jax.models.layers.causal_attention import (
    look_around,
    make_context,
    overflow_is_nan,
    restarts,
)
from mtl_jax.models.layers.encdec_block import Surroundings
from mtl_jax.models.layers.sharding import BLOCK_RULES, Rules, block_rules
from mtl_jax.models.layers.token_embeddings import (
    TokenEmbeddings,
    VocabularyBias,
    head_kernel,
    vocabulary_head,
)

_SIDE = r"^(.*/)?(encoder|decoder)/"
_BLOCK: Rules = (
    (r"cross_attention/(query|key|value)/kernel", P("data", "model")),
    (r"cross_attention/(query|key|value)/bias", P("model")),
    (r"cross_attention/out/kernel", P("model", "data")),
    (r"cross_attention/out/bias", P()),
    (r"norm_cross_attention/(scale|bias)", P()),
    (r"mlp/gate/kernel", P("data", "model")),
    (r"mlp/gate/bias", P("model")),
)

SHARDING_RULES: Rules = (
    # The vocabulary lies on `model`, so that the logits of a tied head do, too.
    (r"^(.*/)?embeddings/word/embedding$", P("model", "data")),
    (r"^(.*/)?head/kernel$", P("data", "model")),
    (r"^(.*/)?head/bias$", P("model")),
    (_SIDE + r"position/embedding$", P(None, "data")),
    (_SIDE + r"relative/embedding$", P(None, "model")),
    (_SIDE + r"(norm|norm_embeddings)/(scale|bias)$", P()),
    *block_rules(_BLOCK),
    *BLOCK_RULES,
)
# For what `init_cache` makes.
CACHE_RULES: Rules = (
    (r"^layers/(memory_)?(key|value)$", P(None, "data", None, "model")),
    (r"^layers_\d+/(memory_)?(key|value)$", P("data", None, "model")),
    (r"^(length|memory_segments)$", P("data")),
)


def head_operands(
    module: "EncoderDecoder", params: Mapping[str, Any], hidden: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """(x, w) whose product x w is the logits, for losses that never make them all.

    Args:
      module: the encoder-decoder.
      params: of it.
      hidden: [B, L, D], what it returned with `head=False`.

    Returns:
      ([B, L, D], [D, V]), with D + 1 in place of D where the head has a bias.
    """
    kernel = head_kernel(params, module.tied)
    if not module.head_bias:
        return hidden, kernel
    one = jnp.ones((*hidden.shape[:2], 1), hidden.dtype)
    bias = params["head"]["bias"].astype(kernel.dtype)[None]
    return jnp.concatenate([hidden, one], -1), jnp.concatenate([kernel, bias])


class EncoderDecoder(nn.Module):
    """Transformer that reads a text and writes another; by default T5 v1.1 small.

    Attributes:
      vocab_size: V, of both texts.
      width: D.
      depth: number of blocks of the decoder.
      encoder_depth: number of blocks of the encoder; None = `depth`.
      num_heads: query heads H per block.
      num_kv_heads: key and value heads K; divides H; None = H.
      head_dim: d; None = D / H.
      mlp_dim: hidden width F of the feed-forward layers.
      max_positions: longest text on either side; None = any.
      norm: "rms" or "layer".
      norm_eps: epsilon of every norm.
      post_norm: norm behind each residual sum, not in front of each branch and
        once at the end.
      embedding_norm: norm the embeddings.
      position: "relative" (a bias by distance, one per side) or "learned".
      position_offset: rows of the learned table in front of position 0.
      relative_buckets: see `layers.RelativeBias`.
      relative_distance: its `max_distance`.
      qkv_bias: give query, key and value a bias.
      out_bias: give the output of every attention a bias.
      mlp_bias: give the feed-forward layers a bias.
      gated: gated feed-forward layers, with a third kernel `gate`.
      activation: a name in `layers.ACTIVATIONS`.
      scale_embeddings: multiply word embeddings by sqrt(D).
      scale_outputs: multiply what the head takes by D^-1/2.
      query_scale: of the attention logits; None = d^-1/2.
      tied: the head is the transposed word embedding.
      head_bias: give the head a bias.
      attention: "einsum", "blocked" or "fused"; see `layers.CausalSelfAttention`.
      scan: one scanned block per side, parameters stacked under `layers`.
      remat: True recomputes each block in the backward pass, "products" all of it
        but its large products; see `layers.rematerialised`.
      dtype: compute dtype; None follows the parameters. Softmax, norms and logits
        are float32 in any case.
      param_dtype: dtype of the parameters.

    **Follows**: Raffel et al. 2020 (T5), Shazeer 2020 (its version 1.1), Lewis et al.
    2020 (BART).

    **Differs**: nothing is dropped out; kernels start as those of `Decoder`.
    """

    vocab_size: int = 32128
    width: int = 512
    depth: int = 8
    encoder_depth: int | None = None
    num_heads: int = 6
    num_kv_heads: int | None = None
    head_dim: int | None = 64
    mlp_dim: int = 1024
    max_positions: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    post_norm: bool = False
    embedding_norm: bool = False
    position: str = "relative"
    position_offset: int = 0
    relative_buckets: int = 32
    relative_distance: int = 128
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "gelu_tanh"
    scale_embeddings: bool = False
    scale_outputs: bool = False
    query_scale: float | None = 1.0
    tied: bool = False
    head_bias: bool = False
    attention: str = "einsum"
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes embeddings, both stacks and the head."""
        check_options(self)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embeddings = TokenEmbeddings(
            vocab_size=self.vocab_size,
            width=self.width,
            num_positions=None,
            scale=self.width**0.5 if self.scale_embeddings else None,
            **dtypes,
        )
        self.encoder = make_stack(self, decodes=False)
        self.decoder = make_stack(self, decodes=True)
        if not self.tied:
            self.head = vocabulary_head(
                self.vocab_size, **dtypes, use_bias=self.head_bias
            )
        elif self.head_bias:
            self.head = VocabularyBias(self.vocab_size, self.param_dtype)

    def __call__(
        self,
        input_ids: chex.Array,
        decoder_input_ids: chex.Array,
        encoder_segment_ids: chex.Array | None = None,
        decoder_segment_ids: chex.Array | None = None,
        encoder_positions: chex.Array | None = None,
        decoder_positions: chex.Array | None = None,
        *,
        prefix: Prefix | None = None,
        logits_at: chex.Array | None = None,
        head: bool = True,
        return_hidden: bool = False,
    ) -> Any:
        """Next-token logits of the texts written, given those read.

        Args:
          input_ids: [B, S] integer, read by the encoder.
          decoder_input_ids: [G B, L] integer, each text behind its start token; row r
            reads what row r // G of the encoder put out.
          encoder_segment_ids: [B, S] int32, 0 = padding; None = all one segment, 1.
          decoder_segment_ids: [G B, L] int32, likewise; tokens see their own segment
            only, on both sides.
          encoder_positions: [B, S] int32, of learned positions; None = counted from
            the start of each segment.
          decoder_positions: [G B, L] int32, likewise.
          prefix: of "encoder", "decoder" and "cross" any, each {"key", "value"} of
            [depth, P, K, d] or [depth, B, P, K, d]: keys and values that every token
            sees besides; they take no position.
          logits_at: [G B, n] integer, the only places whose logits are wanted.
          head: False returns what the head would take, [G B, L, D].
          return_hidden: return the hidden states of encoder and decoder instead, two
            tuples: what enters the first block, and what leaves each.

        Returns:
          [G B, L, V] float32.

        Raises:
          ValueError: if shapes disagree or an option does not exist.
        """
        memory = self.encode(
            input_ids,
            encoder_segment_ids,
            encoder_positions,
            prefix=prefix,
            return_hidden=return_hidden,
        )
        read = memory if return_hidden else ()
        output = self.decode(
            decoder_input_ids,
            memory[-1] if return_hidden else memory,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            prefix=prefix,
            logits_at=logits_at,
            head=head,
            return_hidden=return_hidden,
        )
        return (read[:-1], output) if return_hidden else output

    def encode(
        self,
        input_ids: chex.Array,
        segment_ids: chex.Array | None = None,
        positions: chex.Array | None = None,
        *,
        prefix: Prefix | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """What the decoder reads of the texts: a memory [B, S, D].

        Args:
          input_ids: see `__call__`, as for the rest.
          segment_ids: of the encoder.
          positions: of the encoder.
          prefix: its "encoder" is read.
          return_hidden: return the hidden states and, last, the memory.
        """
        arrays = {"segment_ids": segment_ids, "positions": positions}
        check_tokens(self, "encode", input_ids, arrays)
        own = own_inputs(self, prefix, encoder=("prefix", len(input_ids)))
        ones = jnp.ones(input_ids.shape, jnp.int32)
        segments = ones if segment_ids is None else segment_ids.astype(jnp.int32)
        slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
        if positions is None:
            positions = restarts(segments)
        x, _, hidden = self.encoder(
            self.embeddings(input_ids, positions),
            positions,
            (slots, slots),
            Surroundings(look_around(segments, segments)),
            own=own,
            collect=return_hidden,
        )
        return (*hidden, x) if return_hidden else x

    def decode(
        self,
        input_ids: chex.Array,
        memory: chex.Array | None = None,
        memory_segment_ids: chex.Array | None = None,
        segment_ids: chex.Array | None = None,
        positions: chex.Array | None = None,
        cache: Mapping[str, Any] | None = None,
        *,
        prefix: Prefix | None = None,
        logits_at: chex.Array | None = None,
        head: bool = True,
        return_hidden: bool = False,
    ) -> Any:
        """Next-token logits of the texts written, given a memory.

        Args:
          input_ids: [G B, L], see `decoder_input_ids` of `__call__`.
          memory: [B, S, D], what `encode` returned. With a cache its keys and values
            are kept there; later calls go without it.
          memory_segment_ids: [B, S], those of the encoder; belong to `memory`.
          segment_ids: [G B, L]. With a cache a row is one sequence, its tokens come
            first (padding to the right), and only zero or not matters.
          positions: [G B, L].
          cache: see `init_cache`. The tokens are written at `length[b]` onwards.
          prefix: its "decoder" and "cross" are read; give it to every call.
          logits_at: see `__call__`, as for the rest.
          head: False returns what the head would take.
          return_hidden: return the hidden states.

        Returns:
          [G B, L, V] float32; with a cache (that, new cache). Rows that overflow
          their cache are NaN.

        Raises:
          ValueError: if shapes disagree, or there is nothing to read.
        """
        arrays = {"segment_ids": segment_ids, "positions": positions}
        check_tokens(self, "decode", input_ids, arrays)
        segments = memory_segments(memory, memory_segment_ids, cache)
        check_rows(input_ids, segments)
        own = own_inputs(
            self,
            prefix,
            decoder=("prefix", len(input_ids)),
            cross=("memory_prefix", len(segments)),
        )
        context, positions = make_context(input_ids.shape, **arrays, cache=cache)
        queries = context.query_segments.reshape(len(segments), -1)
        slots = context.query_slots, context.key_slots
        x, layers, hidden = self.decoder(
            self.embeddings(input_ids, positions),
            positions,
            # Without a cache, all rows are alike.
            slots if cache is not None else tuple(x[:1] for x in slots),
            Surroundings(context, look_around(queries, segments), memory),
            own=own,
            cache=cache,
            collect=return_hidden,
        )
        x = overflow_is_nan(x, context)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        if self.scale_outputs:
            x = x * jnp.asarray(self.width**-0.5, x.dtype)
        output = hidden if return_hidden else self._logits(x) if head else x
        if layers is None:
            return output
        length = context.start + context.count
        return output, {**layers, "length": length, "memory_segments": segments}

    def _logits(self, x):
        if not self.tied:
            return self.head(x).astype(jnp.float32)
        logits = self.embeddings.attend(x)
        return self.head(logits) if self.head_bias else logits

    @property
    def dim_of_head(self) -> int:
        """Width d of one head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def depth_of_encoder(self) -> int:
        """Number of blocks of the encoder."""
        return self.depth if self.encoder_depth is None else self.encoder_depth
