"""Linear classification head."""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

SHARDING_RULES = (
    (r"^(.*/)?classifier/kernel$", P("data", None)),
    (r"^(.*/)?classifier/bias$", P()),
)


class Classifier(nn.Module):
    """Features [..., D] to float32 logits [..., num_classes], by one Dense layer.

    Attributes:
      num_classes: C.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel; zeros by default, so that training
        starts from uniform predictions.
    """

    num_classes: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, features: chex.Array) -> chex.Array:
        """Args: features: [..., D]. Returns: [..., C] float32."""
        logits = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="classifier",
        )(features)
        return logits.astype(jnp.float32)
