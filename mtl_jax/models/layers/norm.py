"""Layer and root-mean-square normalisation with float32 statistics."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class LayerNorm(nn.Module):
    """Normalises the last axis, in float32 whatever the input's dtype.

    Computes `(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias`, with the
    biased variance and two passes, so that a large common offset costs no digits.

    Attributes:
      epsilon: added to the variance.
      dtype: dtype of the result; None keeps the input's.
      param_dtype: dtype of `scale` and `bias`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [..., D]. Returns: [..., D]."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(
            jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
        )
        affine = (1,) * (x.ndim - 1) + shape
        y = y * scale.astype(jnp.float32).reshape(affine)
        y = y + bias.astype(jnp.float32).reshape(affine)
        return y.astype(x.dtype if self.dtype is None else self.dtype)


class RmsNorm(nn.Module):
    """Divides the last axis by its root mean square, in float32 inside.

    Computes `x / sqrt(mean(x^2) + epsilon) * scale`, or `* (1 + scale)`.

    Attributes:
      epsilon: added to the mean square.
      unit_offset: multiply by `1 + scale`, with `scale` starting at 0.
      dtype: dtype of the result; None keeps the input's.
      param_dtype: dtype of `scale`.

    **Follows**: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    epsilon: float = 1e-6
    unit_offset: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [..., D]. Returns: [..., D]."""
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        scale = scale.astype(jnp.float32) + (1.0 if self.unit_offset else 0.0)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(
            jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
        )
        y = y * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return y.astype(x.dtype if self.dtype is None else self.dtype)
