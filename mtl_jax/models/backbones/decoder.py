"""Causal language models: one decoder whose options are data."""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.causal_attention import (
    ATTENTIONS,
    CausalSelfAttention,
    make_context,
    overflow_is_nan,
    visible,
)
from mtl_jax.models.layers.decoder_block import DecoderBlock
from mtl_jax.models.layers.feed_forward import FeedForward, GatedFeedForward
from mtl_jax.models.layers.moe import MixtureOfExperts
from mtl_jax.models.layers.norm import LayerNorm, RmsNorm
from mtl_jax.models.layers.prefix import check_prefix
from mtl_jax.models.layers.rotary import rotary_frequencies, rotary_tables
from mtl_jax.models.layers.sharding import BLOCK_RULES, Rules, block_rules
from mtl_jax.models.layers.stack import run_layers
from mtl_jax.models.layers.token_embeddings import TokenEmbeddings, vocabulary_head

_INIT = nn.initializers.normal(0.02)


def _rules(expert_axis: str) -> Rules:
    # On the axis `model` experts are whole; on an axis of their own they are split.
    inner = None if expert_axis == "model" else "model"
    block = (
        (r"attention/norm_(query|key)/scale", P()),
        (r"mlp/gate/kernel", P("data", "model")),
        (r"mlp/gate/bias", P("model")),
        (r"(norm_attention_out|norm_mlp_out)/(scale|bias)", P()),
        (r"mlp/router/kernel", P("data", None)),
        (r"mlp/experts/(gate|in)/kernel", P(expert_axis, "data", inner)),
        (r"mlp/experts/out/kernel", P(expert_axis, inner, "data")),
    )
    return (
        # The vocabulary lies on `model`, so that the logits of a tied head do, too.
        (r"^(.*/)?embeddings/word/embedding$", P("model", "data")),
        (r"^(.*/)?embeddings/position/embedding$", P(None, "data")),
        (r"^(.*/)?norm/(scale|bias)$", P()),
        (r"^(.*/)?head/kernel$", P("data", "model")),
        *block_rules(block),
        *BLOCK_RULES,
    )


SHARDING_RULES = _rules("model")
# For a mesh with an axis `expert` besides `data` and `model`.
EXPERT_SHARDING_RULES = _rules("expert")
# For what `init_cache` makes.
CACHE_RULES: Rules = (
    (r"^layers/(key|value)$", P(None, "data", None, "model")),
    (r"^layers_\d+/(key|value)$", P("data", None, "model")),
    (r"^length$", P("data")),
)


class Decoder(nn.Module):
    """Causal transformer over tokens; the defaults are those of SmolLM2-135M.

    Attributes:
      vocab_size: V.
      width: D.
      depth: number of blocks.
      num_heads: query heads H per block.
      num_kv_heads: key and value heads K; divides H; None = H.
      head_dim: d; None = D / H.
      mlp_dim: hidden width F of the feed-forward layers, or of one expert.
      max_positions: longest context that the model is made for.
      norm: "rms" or "layer".
      norm_eps: epsilon of every norm.
      norm_unit_offset: RMS norms multiply by 1 + scale.
      post_norms: norm what attention and mlp put out, too.
      position: "rotary" or "learned".
      rotary_base: theta.
      rotary_scaling: see `layers.rotary_frequencies`.
      qkv_bias: give query, key and value a bias.
      out_bias: give the output of the attention a bias.
      mlp_bias: give the feed-forward layers a bias.
      qk_norm: None, "head" or "projection"; see `layers.CausalSelfAttention`.
      gated: gated feed-forward layers, with a third kernel `gate`.
      activation: a name in `layers.ACTIVATIONS`.
      scale_embeddings: multiply word embeddings by sqrt(D).
      query_scale: of the attention logits; None = d^-1/2.
      attention_softcap: c of `c tanh(logits / c)` in the attention, or None.
      logit_softcap: the same for the final logits.
      windows: block i looks back on `windows[i % len(windows)]` tokens, itself
        included; 0 = all; () = all in every block.
      tied: the head is the transposed word embedding.
      num_experts: E; 0 = plain feed-forward layers.
      experts_per_token: k.
      normalize_experts: let the k weights of a token sum to one.
      skip_experts: see `layers.MixtureOfExperts`.
      experts: see `layers.apply_experts`.
      attention: "einsum", "blocked" or "fused"; see `layers.CausalSelfAttention`.
      scan: one scanned block, parameters stacked under `layers`.
      remat: True recomputes each block in the backward pass, "products" all of it
        but its large products; see `layers.rematerialised`.
      dtype: compute dtype; None follows the parameters. Softmax, norms and logits
        are float32 in any case.
      param_dtype: dtype of the parameters.

    **Follows**: Radford et al. 2019 (GPT-2), Touvron et al. 2023 and Grattafiori et
    al. 2024 (Llama 2 and 3), Gemma Team 2024 (Gemma 1 and 2), Yang et al. 2024 and
    2025 (Qwen2 and 3), Muennighoff et al. 2024 (OLMoE), Ben Allal et al. 2025
    (SmolLM2).

    **Differs**: nothing is dropped out.
    """

    vocab_size: int = 49152
    width: int = 576
    depth: int = 30
    num_heads: int = 9
    num_kv_heads: int | None = 3
    head_dim: int | None = None
    mlp_dim: int = 1536
    max_positions: int = 8192
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    post_norms: bool = False
    position: str = "rotary"
    rotary_base: float = 1e5
    rotary_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    gated: bool = True
    activation: str = "silu"
    scale_embeddings: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    tied: bool = True
    num_experts: int = 0
    experts_per_token: int = 2
    normalize_experts: bool = False
    skip_experts: float = 0.0
    experts: str | None = None
    attention: str = "einsum"
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: chex.Array,
        segment_ids: chex.Array | None = None,
        positions: chex.Array | None = None,
        cache: Mapping[str, Any] | None = None,
        *,
        prefix: Mapping[str, chex.Array] | None = None,
        routing_override: chex.Array | None = None,
        logits_at: chex.Array | None = None,
        head: bool = True,
        return_hidden: bool = False,
    ) -> Any:
        """Next-token logits of a batch of rows.

        Args:
          input_ids: [B, L] integer.
          segment_ids: [B, L] int32, 0 = padding; tokens see their own segment only.
            With a cache a row is one sequence, its tokens come first (padding to the
            right), and only zero or not matters. None = all one segment.
          positions: [B, L] int32; None = counted from the start of each segment, or
            on from the length of the cache.
          cache: see `init_cache`. The tokens are written at `length[b]` onwards.
          prefix: {"key", "value"}, each [depth, P, K, d] or [depth, B, P, K, d]:
            keys and values that every token sees besides; they take no position.
          routing_override: [depth, B, L, E], see `layers.MixtureOfExperts`.
          logits_at: [B, n] integer, the only places whose logits are wanted.
          head: False returns what the head would take, [B, L, D].
          return_hidden: return the `depth + 1` hidden states [B, L, D] instead, what
            enters the first block first and without the last norm.

        Returns:
          [B, L, V] float32; with a cache (that, new cache). Rows that overflow their
          cache are NaN.

        Raises:
          ValueError: if shapes disagree or an option does not exist.
        """
        arrays = {"segment_ids": segment_ids, "positions": positions}
        self._check(input_ids, arrays, prefix, routing_override)
        context, positions = make_context(input_ids.shape, **arrays, cache=cache)
        context = self._complete(context, positions)
        embeddings = TokenEmbeddings(
            vocab_size=self.vocab_size,
            width=self.width,
            num_positions=self.max_positions if self.position == "learned" else None,
            scale=self.width**0.5 if self.scale_embeddings else None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embeddings",
        )
        x = embedded = embeddings(input_ids, positions)
        own = {"window": self._windows(), "prefix": prefix, "routing": routing_override}
        x, layers, hidden = run_layers(
            self._make_block,
            self.depth,
            x,
            context,
            own={k: v for k, v in own.items() if v is not None},
            cache=cache,
            scan=self.scan,
            remat=self.remat,
            collect=return_hidden,
        )
        x = self._norm()(name="norm")(x)
        x = overflow_is_nan(x, context)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        output = x if not head else self._logits(embeddings, x)
        output = (embedded, *hidden) if return_hidden else output
        if layers is None:
            return output
        return output, {**layers, "length": context.start + context.count}

    def _complete(self, context, positions):
        """Adds what every layer would compute again."""
        if self.position == "rotary":
            rates = rotary_frequencies(
                self.dim_of_head, self.rotary_base, self.rotary_scaling
            )
            context = context._replace(rotary=rotary_tables(positions, rates))
        if self.attention != "blocked":
            context = context._replace(mask=visible(context))
        return context

    def _logits(self, embeddings, x):
        if self.tied:
            logits = embeddings.attend(x)
        else:
            head = vocabulary_head(
                self.vocab_size, self.dtype, self.param_dtype, name="head"
            )
            logits = head(x).astype(jnp.float32)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        return logits

    def _make_block(self, name):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"activation": self.activation, **dtypes}
        if self.num_experts:
            mlp = functools.partial(
                MixtureOfExperts,
                self.num_experts,
                self.experts_per_token,
                self.mlp_dim,
                normalize=self.normalize_experts,
                skip=self.skip_experts,
                implementation=self.experts,
                **options,
            )
        else:
            mlp = functools.partial(
                GatedFeedForward if self.gated else FeedForward,
                self.mlp_dim,
                use_bias=self.mlp_bias,
                kernel_init=_INIT,
                **options,
            )
        attention = functools.partial(
            CausalSelfAttention,
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.dim_of_head,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            norm_unit_offset=self.norm_unit_offset,
            scale=self.query_scale,
            softcap=self.attention_softcap,
            implementation=self.attention,
            **dtypes,
        )
        return DecoderBlock(
            norm=self._norm(),
            attention=attention,
            mlp=mlp,
            post_norms=self.post_norms,
            name=name,
        )

    def _norm(self):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.norm == "layer":
            return functools.partial(LayerNorm, self.norm_eps, **dtypes)
        return functools.partial(
            RmsNorm, self.norm_eps, self.norm_unit_offset, **dtypes
        )

    def _windows(self):
        if not any(self.windows):
            return None
        cycle = [self.windows[i % len(self.windows)] for i in range(self.depth)]
        return jnp.array(cycle, jnp.int32)

    @property
    def dim_of_head(self) -> int:
        """Width d of one head."""
        return self.head_dim or self.width // self.num_heads

    def _check(self, input_ids, arrays, prefix, routing_override):
        if input_ids.ndim != 2:
            raise ValueError(f"Decoder: input_ids must be [B, L], is {input_ids.shape}")
        for name, array in arrays.items():
            if array is not None and array.shape != input_ids.shape:
                raise ValueError(
                    f"Decoder: {name} is {array.shape}, input_ids {input_ids.shape}"
                )
        batch, length = input_ids.shape
        if length > self.max_positions and all(a is None for a in arrays.values()):
            raise ValueError(
                f"Decoder: input_ids may have at most {self.max_positions} positions, "
                f"found {length}"
            )
        self._check_options()
        check_prefix(
            "Decoder: prefix",
            prefix,
            depth=self.depth,
            batch=batch,
            heads=self.num_kv_heads or self.num_heads,
            dim=self.dim_of_head,
        )
        routing = (self.depth, batch, length, self.num_experts)
        if routing_override is not None and routing_override.shape != routing:
            raise ValueError(
                f"Decoder: routing_override is {routing_override.shape}, wanted "
                f"{routing}"
            )

    def _check_options(self):
        known = {
            "norm": ("rms", "layer"),
            "position": ("rotary", "learned"),
            "qk_norm": (None, "head", "projection"),
            "attention": ATTENTIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"Decoder: {name} must be one of {values}, is "
                    f"{getattr(self, name)!r}"
                )
        heads = self.num_heads, self.num_kv_heads or self.num_heads
        if heads[0] % heads[1]:
            raise ValueError(
                f"Decoder: num_kv_heads must divide num_heads, found {heads[1]} and "
                f"{heads[0]}"
            )
        if self.attention == "fused" and self.attention_softcap is not None:
            raise ValueError("Decoder: fused attention has no attention_softcap")
