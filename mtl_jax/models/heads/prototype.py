"""Classification by cosine similarity to one prototype per class."""

import chex
import jax
import jax.numpy as jnp


def l2_normalize(x: chex.Array, epsilon: float = 1e-12) -> chex.Array:
    """`x / max(||x||, epsilon)` over the last axis, with a finite gradient at zero.

    Args:
      x: [..., D].
      epsilon: smallest norm that is divided by.

    Returns:
      [..., D] in the dtype of x, computed in float32.
    """
    y = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.maximum(square, jnp.float32(epsilon) ** 2))
    return y.astype(x.dtype)


def prototype_logits(
    features: chex.Array, prototypes: chex.Array, logit_scale: chex.Numeric = 1.0
) -> chex.Array:
    """`logit_scale * <f / ||f||, p_c>` for every class c.

    Args:
      features: [B, D] floating point, of any length.
      prototypes: [C, D] floating point, unit rows (see `l2_normalize`).
      logit_scale: inverse temperature.

    Returns:
      [B, C] float32, computed in full float32 precision on every backend.

    Raises:
      ValueError: if the widths disagree.

    **Follows**: zero-shot classification of Radford et al. 2021, "Learning
    Transferable Visual Models From Natural Language Supervision", section 3.1.
    """
    if features.ndim != 2 or prototypes.ndim != 2:
        raise ValueError(
            f"prototype_logits: wanted features [B, D] and prototypes [C, D], found "
            f"{features.shape} and {prototypes.shape}"
        )
    if features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"prototype_logits: features are {features.shape[1]} wide, prototypes "
            f"{prototypes.shape[1]}"
        )
    unit = l2_normalize(features.astype(jnp.float32))
    cosine = jnp.einsum(
        "bd,cd->bc", unit, prototypes.astype(jnp.float32), precision="highest"
    )
    return cosine * jnp.asarray(logit_scale, jnp.float32)
