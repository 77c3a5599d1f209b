"""Multi-layer perceptron."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.feed_forward import activation

SHARDING_RULES = (
    (r"^(.*/)?layers_\d+/kernel$", P("data", "model")),
    (r"^(.*/)?layers_\d+/bias$", P("model")),
)


class Mlp(nn.Module):
    """Dense layers with an activation between them.

    Attributes:
      features: width of each layer; the last is the width of the output.
      activation: a name in `layers.ACTIVATIONS`.
      activate_final: also apply the activation to the output.
      flatten: first flatten everything but the batch axis, as for images.
      use_bias: give the layers biases.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    features: Sequence[int]
    activation: str = "relu"
    activate_final: bool = False
    flatten: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, ..., D]. Returns: [B, ..., features[-1]]."""
        if not self.features:
            raise ValueError("Mlp: features must name at least one width, is empty")
        if self.flatten:
            x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(
                width,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"layers_{i}",
            )(x)
            if self.activate_final or i < len(self.features) - 1:
                x = activation(self.activation)(x)
        return x
