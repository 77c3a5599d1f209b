"""Metrics of classification, one value per example."""

import chex
import jax
import jax.core
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


def roc_auc(scores: chex.Array, labels: chex.Array) -> chex.Array:
    """Area under the ROC curve: how often a positive scores above a negative.

    Ties count one half.

    Args:
      scores: [N] real.
      labels: [N] bool or integer; positive where above 0.

    Returns:
      float32 scalar; NaN under jit where one of the classes is empty.

    Raises:
      ValueError: shapes that differ, or concrete labels of one class only.

    **Follows**: Hanley and McNeil 1982 (the Wilcoxon statistic).

    >>> float(roc_auc(jnp.array([0.1, 0.4, 0.4, 0.8]), jnp.array([0, 0, 1, 1])))
    0.875
    """
    scores, labels = jnp.asarray(scores), jnp.asarray(labels)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"roc_auc: wanted scores and labels [N], found {scores.shape} and "
            f"{labels.shape}"
        )
    positive = labels > 0
    ones = jnp.sum(positive.astype(jnp.float32))
    zeros = scores.shape[0] - ones
    if not isinstance(ones, jax.core.Tracer) and not (ones > 0 and zeros > 0):
        raise ValueError(
            f"roc_auc: wanted labels of both classes, found {int(ones)} of "
            f"{scores.shape[0]} positive"
        )
    # Negatives below each score, and not above it: their mean counts ties one half.
    negatives = jnp.sort(jnp.where(positive, jnp.inf, scores.astype(jnp.float32)))
    wide = scores.astype(jnp.float32)
    below = jnp.searchsorted(negatives, wide, side="left")
    within = jnp.searchsorted(negatives, wide, side="right")
    beaten = (below + within).astype(jnp.float32) / 2
    # Scaled before the sum: the counts of large N exceed the precision of float32.
    return jnp.sum(jnp.where(positive, beaten / zeros, 0)) / ones
