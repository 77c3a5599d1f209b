"""Metrics of classification, one value per example."""

import chex
import jax.numpy as jnp

from mtl_jax.losses._arguments import check_labels, class_mask_like


def accuracy(
    logits: chex.Array, labels: chex.Array, class_mask: chex.Array | None = None
) -> chex.Array:
    """1 where the largest active logit is that of the label, else 0.

    Args:
      logits: [..., C] floating point; the first of equal ones wins.
      labels: [...] integer.
      class_mask: [C] or [..., C] bool, True = the class takes part; None = all do.

    Returns:
      [...] float32. A row whose logits hold a NaN counts as wrong.

    Raises:
      ValueError: if shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> accuracy(jnp.array([[0.0, 2.0], [3.0, 1.0]]), jnp.array([1, 1]))
    Array([1., 0.], dtype=float32)
    """
    check_labels("accuracy", logits, labels)
    sound = ~jnp.any(jnp.isnan(logits), axis=-1)
    if class_mask is not None:
        mask = class_mask_like("accuracy", logits, class_mask)
        logits = jnp.where(mask, logits, jnp.full_like(logits, -jnp.inf))
    hit = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return (hit & sound).astype(jnp.float32)


def top_k_accuracy(logits: chex.Array, labels: chex.Array, k: int) -> chex.Array:
    """1 where fewer than k logits are larger than that of the label, else 0.

    Args:
      logits: [..., C] floating point; equal logits count by class index.
      labels: [...] integer in [0, C); any other counts as wrong.
      k: between 1 and C.

    Returns:
      [...] float32. A row whose logits hold a NaN counts as wrong.

    Raises:
      ValueError: if shapes, dtypes or k do not fit.
    """
    check_labels("top_k_accuracy", logits, labels)
    num_classes = logits.shape[-1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"top_k_accuracy: k must be in [1, {num_classes}], is {k}")
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    classes = classes.reshape((1,) * labels.ndim + (-1,))
    hit = classes == labels[..., None]
    own = jnp.sum(jnp.where(hit, logits, jnp.zeros_like(logits)), -1, keepdims=True)
    ahead = (logits > own) | ((logits == own) & (classes < labels[..., None]))
    rank = jnp.sum(ahead, axis=-1)
    sound = jnp.any(hit, axis=-1) & ~jnp.any(jnp.isnan(logits), axis=-1)
    return ((rank < k) & sound).astype(jnp.float32)
