"""Feed-forward blocks and the activations they may use."""

import functools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax.models.layers.remat import keep_product


def quick_gelu(x: chex.Array) -> chex.Array:
    """The approximation `x * sigmoid(1.702 x)` of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[chex.Array], chex.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[chex.Array], chex.Array]:
    """Looks an activation up by name.

    Raises:
      ValueError: listing the names that exist.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"activation: no {name!r}, known: {known}")
    return ACTIVATIONS[name]


class FeedForward(nn.Module):
    """`out(activation(in(x)))`, back to the width of x.

    Attributes:
      hidden: width of the hidden layer.
      activation: a name in `ACTIVATIONS`.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of both kernels.
      use_bias: give both layers a bias.
    """

    hidden: int
    activation: str = "gelu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    use_bias: bool = True

    def _dense(self, name: str, x: chex.Array, width: int) -> chex.Array:
        dense = nn.Dense(
            width,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name=name,
        )
        return keep_product(dense(x))

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [..., D]. Returns: [..., D]."""
        y = activation(self.activation)(self._dense("in", x, self.hidden))
        return self._dense("out", y, x.shape[-1])


class GatedFeedForward(FeedForward):
    """`out(activation(gate(x)) * in(x))`, back to the width of x.

    Attributes:
      hidden: width of the hidden layer.
      activation: a name in `ACTIVATIONS`.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the three kernels.
      use_bias: give the three layers a bias.

    **Follows**: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    activation: str = "silu"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [..., D]. Returns: [..., D]."""
        y = activation(self.activation)(self._dense("gate", x, self.hidden))
        return self._dense("out", y * self._dense("in", x, self.hidden), x.shape[-1])
