"""Losses of classification, one value per example."""

import chex
import jax
import jax.numpy as jnp

from mtl_jax.losses._arguments import check_labels, class_mask_like


def softmax_cross_entropy(
    logits: chex.Array,
    labels: chex.Array,
    class_mask: chex.Array | None = None,
    *,
    label_smoothing: float = 0.0,
) -> chex.Array:
    """`-(1 - s) log p[label] - s mean_c log p[c]`, p the softmax over active classes.

    Args:
      logits: [..., C] floating point.
      labels: [...] integer.
      class_mask: [C] or [..., C] bool, True = the class takes part; None = all do.
      label_smoothing: s, spread evenly over the active classes.

    Returns:
      [...] float32. A label outside [0, C) or at an inactive class costs +inf: it is
      an error in the data and must not pass unseen.

    Raises:
      ValueError: if shapes or dtypes do not fit.

    >>> import jax.numpy as jnp
    >>> softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4)
    Array([1.3863], dtype=float32)
    """
    name = "softmax_cross_entropy"
    check_labels(name, logits, labels)
    log_p = log_softmax(name, logits, class_mask)
    active = jnp.isfinite(log_p)
    classes = jax.lax.broadcasted_iota(labels.dtype, log_p.shape, log_p.ndim - 1)
    hit = (labels[..., None] == classes) & active
    loss = -jnp.sum(jnp.where(hit, log_p, 0), axis=-1)
    if label_smoothing:
        spread = -jnp.mean(log_p, axis=-1, where=active)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return jnp.where(jnp.any(hit, axis=-1), loss, jnp.inf)


def softmax_entropy(
    logits: chex.Array, class_mask: chex.Array | None = None
) -> chex.Array:
    """Entropy of the prediction, `-sum_c p[c] log p[c]`, in nats.

    Args:
      logits: [..., C] floating point.
      class_mask: [C] or [..., C] bool, True = the class takes part; None = all do.

    Returns:
      [...] float32.

    Raises:
      ValueError: if `class_mask` does not fit.
    """
    log_p = log_softmax("softmax_entropy", logits, class_mask)
    log_p = jnp.where(jnp.isfinite(log_p), log_p, 0)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def kl_divergence(target_logits: chex.Array, logits: chex.Array) -> chex.Array:
    """`KL(p || q) = sum_c p[c] (log p[c] - log q[c])`, p from the target logits.

    Args:
      target_logits: [..., C] floating point.
      logits: [..., C] floating point.

    Returns:
      [...] float32.

    Raises:
      ValueError: if the shapes differ.
    """
    if target_logits.shape != logits.shape:
        raise ValueError(
            f"kl_divergence: target_logits are {target_logits.shape}, logits "
            f"{logits.shape}"
        )
    log_p = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def sigmoid_cross_entropy(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """`-t log s(x) - (1 - t) log(1 - s(x))` for every logit, s the sigmoid.

    Args:
      logits: [...] floating point.
      targets: [...] in [0, 1], any real dtype.

    Returns:
      [...] float32.

    Raises:
      ValueError: if the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"sigmoid_cross_entropy: logits are {logits.shape}, targets {targets.shape}"
        )
    x = logits.astype(jnp.float32)
    return jax.nn.softplus(x) - x * targets.astype(jnp.float32)


def log_softmax(name, logits, class_mask):
    """Float32 log-probabilities; -inf at inactive classes, gradients finite."""
    x = logits.astype(jnp.float32)
    if class_mask is None:
        return jax.nn.log_softmax(x, axis=-1)
    mask = jnp.broadcast_to(class_mask_like(name, logits, class_mask), x.shape)
    log_p = jax.nn.log_softmax(jnp.where(mask, x, -jnp.inf), axis=-1)
    return jnp.where(mask, log_p, -jnp.inf)
