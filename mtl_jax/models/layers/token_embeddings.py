"""Token embeddings that a tied head can share, and heads."""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_INIT = nn.initializers.normal(0.02)


class TokenEmbeddings(nn.Module):
    """Word and, where positions are learned, position embeddings.

    Attributes:
      vocab_size: V.
      width: D.
      num_positions: how many positions are learned; None = none.
      scale: of the word embeddings; None = as they are.
      dtype: compute dtype; None follows the parameters.
      param_dtype: dtype of the parameters.
    """

    vocab_size: int
    width: int
    num_positions: int | None
    scale: float | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    def setup(self):
        """Makes the tables."""

        # Rows are looked up in the storage dtype and cast then, not the whole table.
        def embed(size):
            return nn.Embed(
                size, self.width, embedding_init=_INIT, param_dtype=self.param_dtype
            )

        self.word = embed(self.vocab_size)
        if self.num_positions is not None:
            self.position = embed(self.num_positions)

    def __call__(self, input_ids: chex.Array, positions: chex.Array) -> chex.Array:
        """Args: input_ids, positions: [B, L] integer. Returns: [B, L, D]."""
        dtype = self.param_dtype if self.dtype is None else self.dtype
        x = self.word(input_ids).astype(dtype)
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, dtype)
        if self.num_positions is not None:
            x = x + self.position(positions).astype(dtype)
        return x

    def attend(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, L, D]. Returns: [B, L, V] float32 products with every word."""
        table = self.word.embedding.astype(x.dtype)
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)


def vocabulary_head(
    vocab_size: int,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    *,
    use_bias: bool = False,
    name: str | None = None,
) -> nn.Dense:
    """A head of its own: [B, L, D] to [B, L, V], summed in float32."""
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    return nn.Dense(
        vocab_size,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_INIT,
        dot_general=dot,
        name=name,
    )


def head_kernel(params: Mapping[str, Any], tied: bool) -> chex.Array:
    """What the hidden states are multiplied with for logits, [D, V].

    Args:
      params: of a language model; "embeddings" or "head" is read.
      tied: whether the head is the transposed word embedding.
    """
    if tied:
        return params["embeddings"]["word"]["embedding"].T
    return params["head"]["kernel"]


class VocabularyBias(nn.Module):
    """What a tied head adds to its logits.

    Attributes:
      vocab_size: V.
      param_dtype: dtype of the parameters.
    """

    vocab_size: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, logits: chex.Array) -> chex.Array:
        """Args: logits: [B, L, V] float32. Returns: [B, L, V] float32."""
        shape = (self.vocab_size,)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return logits + bias.astype(jnp.float32)[None, None]
