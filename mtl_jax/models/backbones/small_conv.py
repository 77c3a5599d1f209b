"""A small convolutional network for images of 8 to 64 pixels."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.feed_forward import activation

SHARDING_RULES = (
    (r"^(.*/)?conv/kernel$", P(None, None, None, "model")),
    (r"^(.*/)?conv/bias$", P("model")),
    (r"^(.*/)?features/kernel$", P("data", "model")),
    (r"^(.*/)?features/bias$", P("model")),
)


def max_pool(x: chex.Array, window: tuple[int, int]) -> chex.Array:
    """Largest value of each window; windows touch, and the last ones may be smaller.

    The maximum over axes of a reshaped array: XLA's gradient of a pooling window is
    many times slower on CPU.

    Args:
      x: [B, H, W, C] floating point.
      window: height and width of a window.

    Returns:
      [B, ceil(H / window[0]), ceil(W / window[1]), C].
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window[0]), -(-width // window[1])
    rest = (rows * window[0] - height, columns * window[1] - width)
    pad = ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0))
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
    shape = batch, rows, window[0], columns, window[1], channels
    return jnp.max(x.reshape(shape), axis=(2, 4))


class ConvStage(nn.Module):
    """3x3 convolution, activation, then 2x2 max-pooling.

    An odd last row or column is pooled on its own, so that no pixel is lost.

    Attributes:
      channels: C' of the output.
      pool: halve height and width (rounding up).
      activation: a name in `layers.ACTIVATIONS`.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    channels: int
    pool: bool = True
    activation: str = "relu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, H, W, C]. Returns: [B, ceil(H / 2), ceil(W / 2), channels]."""
        if x.ndim != 4:
            raise ValueError(f"ConvStage: wanted [B, H, W, C], found {x.shape}")
        x = nn.Conv(
            self.channels,
            (3, 3),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(x)
        x = activation(self.activation)(x)
        return max_pool(x, (2, 2)) if self.pool else x


class SmallConv(nn.Module):
    """`ConvStage`s, then one dense layer that keeps where things are.

    The last map is flattened and not averaged: which corner a digit lies in is part
    of what overlaid images ask for.

    Attributes:
      channels: C of each stage.
      width: D of the features; None returns the last map instead.
      activation: a name in `layers.ACTIVATIONS`.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    channels: Sequence[int] = (16, 32)
    width: int | None = 64
    activation: str = "relu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: chex.Array) -> chex.Array:
        """Args: images: [B, H, W, C]. Returns: [B, width], or the map [B, h, w, C']."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = images
        for i, channels in enumerate(self.channels):
            x = ConvStage(
                channels, activation=self.activation, name=f"stages_{i}", **options
            )(x)
        if self.width is None:
            return x
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(self.width, name="features", **options)(x)
        return activation(self.activation)(x)
