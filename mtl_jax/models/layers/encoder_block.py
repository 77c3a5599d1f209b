"""Pre-norm block of an encoder."""

import chex
import flax.linen as nn
from jax.typing import DTypeLike

from mtl_jax.models.layers.attention import SelfAttention
from mtl_jax.models.layers.feed_forward import FeedForward
from mtl_jax.models.layers.norm import LayerNorm


class PreNormBlock(nn.Module):
    """`y = x + attention(norm(x))`, then `y + mlp(norm(y))`.

    Attributes:
      num_heads: heads of the attention.
      mlp_dim: hidden width of the feed-forward layers.
      activation: a name in `layers.ACTIVATIONS`.
      norm_eps: epsilon of both norms.
      dropout: rate on both residual branches.
      deterministic: False switches dropout on.
      dtype: compute dtype; None follows the parameters.
      param_dtype: dtype of the parameters.
    """

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

        attention = SelfAttention(self.num_heads, name="attention", **options)
        mlp = FeedForward(self.mlp_dim, self.activation, name="mlp", **options)
        y = LayerNorm(self.norm_eps, name="norm_attention", **options)(x)
        x = x + drop(attention(y, bias))
        y = LayerNorm(self.norm_eps, name="norm_mlp", **options)(x)
        return x + drop(mlp(y))
