"""Multi-head self-attention with an additive float32 bias."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax.models.layers.remat import keep_product

# Absorbs any finite logit in float32, yet a row of nothing but masked keys stays
# finite (it attends uniformly) where -inf would give NaN.
_MASKED = -1e30


def mask_bias(mask: chex.Array) -> chex.Array:
    """Additive attention bias of a key mask: 0 where active, -1e30 elsewhere.

    Args:
      mask: [B, L] bool or integer; True (non-zero) = active.

    Returns:
      [B, 1, 1, L] float32, to be added to logits [B, H, L, L].
    """
    return jnp.where(mask.astype(bool)[:, None, None, :], 0.0, _MASKED).astype(
        jnp.float32
    )


def causal_bias(length: int) -> chex.Array:
    """Additive attention bias by which no position sees a later one.

    Args:
      length: L.

    Returns:
      [1, 1, L, L] float32, 0 or -1e30; adds up with `mask_bias`.
    """
    slots = jnp.arange(length, dtype=jnp.int32)
    seen = slots[:, None] >= slots[None, :]
    return jnp.where(seen, 0.0, _MASKED).astype(jnp.float32)[None, None]


def attend(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    bias: chex.Array | None = None,
) -> chex.Array:
    """Scaled dot-product attention, `softmax(Q K^T / sqrt(d) + bias) V`.

    Args:
      query: [B, L, H, d].
      key: [B, M, H, d].
      value: [B, M, H, d].
      bias: float32, broadcastable by unit axes to [B, H, L, M], or None.

    Returns:
      [B, L, H, d] in the dtype of `value`; logits and softmax are float32.
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    logits = jnp.einsum(
        "blhd,bmhd->bhlm", query, key, preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)


class SelfAttention(nn.Module):
    """Multi-head self-attention: `query`, `key`, `value` and `out` are `nn.Dense`.

    Plain [D, D] kernels keep every rule on paths and every adapter on `nn.Dense`
    applicable.

    Attributes:
      num_heads: H; must divide the width.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the four kernels.
    """

    num_heads: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: chex.Array, bias: chex.Array | None = None) -> chex.Array:
        """Attends over the second axis.

        Args:
          x: [B, L, D].
          bias: see `attend`.

        Returns:
          [B, L, D].

        Raises:
          ValueError: if `num_heads` does not divide D.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"SelfAttention: num_heads must divide the width, found "
                f"{self.num_heads} heads for width {width}"
            )

        def project(name, y):
            dense = nn.Dense(
                width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )
            return keep_product(dense(y))

        heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
        query, key, value = (
            project(name, x).reshape(heads) for name in ("query", "key", "value")
        )
        heads = attend(query, key, value, bias).reshape(x.shape)
        return project("out", keep_product(heads))
