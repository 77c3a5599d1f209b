"""BERT encoder; the defaults are those of MiniLM-L6 (width 384)."""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.attention import SelfAttention, mask_bias
from mtl_jax.models.layers.feed_forward import FeedForward
from mtl_jax.models.layers.norm import LayerNorm
from mtl_jax.models.layers.sharding import BLOCK_RULES
from mtl_jax.models.layers.stack import run_stack

SHARDING_RULES = (
    (r"^(.*/)?embeddings/(word|position|token_type)/embedding$", P(None, "data")),
    (r"^(.*/)?embeddings/norm/(scale|bias)$", P()),
    *BLOCK_RULES,
)

_INIT = nn.initializers.normal(0.02)


class BertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, then layer norm."""

    vocab_size: int
    max_positions: int
    num_token_types: int
    width: int
    norm_eps: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, input_ids: chex.Array, token_type_ids: chex.Array | None
    ) -> chex.Array:
        """Args: input_ids, token_type_ids: [B, L] integer. Returns: [B, L, D]."""
        length = input_ids.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"Bert: input_ids may have at most {self.max_positions} positions, "
                f"found {length}"
            )

        def embed(name, size):
            return nn.Embed(
                size,
                self.width,
                embedding_init=_INIT,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        x = embed("word", self.vocab_size)(input_ids)
        x = x + embed("token_type", self.num_token_types)(token_type_ids)
        x = x + embed("position", self.max_positions)(jnp.arange(length)[None])
        return LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)


class BertBlock(nn.Module):
    """Post-norm block: `y = norm(x + attention(x))`, then `norm(y + mlp(y))`."""

    num_heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    dropout: float
    deterministic: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: chex.Array, bias: chex.Array | None) -> chex.Array:
        """Args: x: [B, L, D]; bias: see `attend`. Returns: [B, L, D]."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def drop(y):
            return nn.Dropout(self.dropout, deterministic=self.deterministic)(y)

        attention = SelfAttention(
            self.num_heads, kernel_init=_INIT, name="attention", **options
        )
        mlp = FeedForward(
            self.mlp_dim, self.activation, kernel_init=_INIT, name="mlp", **options
        )
        x = x + drop(attention(x, bias))
        x = LayerNorm(self.norm_eps, name="norm_attention", **options)(x)
        x = x + drop(mlp(x))
        return LayerNorm(self.norm_eps, name="norm_mlp", **options)(x)


class Bert(nn.Module):
    """Bidirectional encoder over tokens, without a pooler.

    Attributes:
      vocab_size: number of word pieces.
      width: D.
      depth: number of blocks.
      num_heads: heads per block; must divide `width`.
      mlp_dim: hidden width of the feed-forward layers.
      max_positions: longest sequence that has position embeddings.
      num_token_types: number of segments.
      activation: a name in `layers.ACTIVATIONS`; "gelu" is the exact one.
      norm_eps: epsilon of every layer norm.
      dropout: rate after the embeddings and on both residual branches; needs an rng
        named "dropout" when `deterministic=False`.
      scan: one scanned block, parameters stacked under `layers`.
      remat: True recomputes each block in the backward pass, "products" all of it
        but its large products; see `layers.rematerialised`.
      embed: False for the upper blocks of an encoder alone, which read the hidden
        states [B, L, D] that the lower ones put out in the place of `input_ids`.
      dtype: compute dtype; None follows the parameters.
      param_dtype: dtype of the parameters.

    **Follows**: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional
    Transformers"; sizes of Wang et al. 2020, "MiniLM".

    **Differs**: attention weights are not dropped out; the pooler, which sentence
    encoders do not use, is left out.
    """

    vocab_size: int = 30522
    width: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_dim: int = 1536
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    scan: bool = False
    remat: bool | str = False
    embed: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: chex.Array,
        attention_mask: chex.Array | None = None,
        token_type_ids: chex.Array | None = None,
        *,
        deterministic: bool = True,
        return_hidden: bool = False,
    ) -> chex.Array | tuple[chex.Array, ...]:
        """Encodes a batch of token sequences.

        Args:
          input_ids: [B, L] integer, or hidden states, see `embed`.
          attention_mask: [B, L] bool or integer, non-zero = token; None = all.
          token_type_ids: [B, L] integer; None = all 0.
          deterministic: False switches dropout on.
          return_hidden: return every hidden state instead of the last.

        Returns:
          [B, L, D]; with `return_hidden` a tuple of `depth + 1` of them, the
          embeddings first.

        Raises:
          ValueError: if shapes disagree or L exceeds `max_positions`.
        """
        self._check(input_ids, attention_mask, token_type_ids)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = input_ids
        if self.embed:
            x = BertEmbeddings(
                vocab_size=self.vocab_size,
                max_positions=self.max_positions,
                num_token_types=self.num_token_types,
                width=self.width,
                norm_eps=self.norm_eps,
                name="embeddings",
                **options,
            )(input_ids, token_type_ids)
            x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        embedded = x

        def make_block(name):
            return BertBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                activation=self.activation,
                norm_eps=self.norm_eps,
                dropout=self.dropout,
                deterministic=deterministic,
                name=name,
                **options,
            )

        x, outputs = run_stack(
            make_block,
            self.depth,
            x,
            None if attention_mask is None else mask_bias(attention_mask),
            scan=self.scan,
            remat=self.remat,
            collect=return_hidden,
        )
        return (embedded, *outputs) if return_hidden else x

    def _check(self, input_ids, attention_mask, token_type_ids):
        if not self.embed:
            if input_ids.ndim != 3 or input_ids.shape[2] != self.width:
                raise ValueError(
                    f"Bert: without embeddings it reads hidden states [B, L, "
                    f"{self.width}], found {input_ids.shape}"
                )
        elif input_ids.ndim != 2:
            raise ValueError(f"Bert: input_ids must be [B, L], is {input_ids.shape}")
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, array in others.items():
            if array is not None and array.shape != input_ids.shape[:2]:
                raise ValueError(
                    f"Bert: {name} is {array.shape}, input_ids {input_ids.shape}"
                )
