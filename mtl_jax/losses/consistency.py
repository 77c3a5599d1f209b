"""Losses without labels: the prediction from one view is the target of another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.losses._arguments import check_labels
from mtl_jax.losses.classification import log_softmax


def fixmatch(
    weak_logits: chex.Array,
    strong_logits: chex.Array,
    labels: chex.Array | None = None,
    known: chex.Array | None = None,
    class_mask: chex.Array | None = None,
    *,
    threshold: float = 0.99,
) -> tuple[chex.Array, chex.Array]:
    """`-sum_c q[c] log p[c]`, p from the strong view, q the target from the weak one.

    q is the prediction from the weak view without its gradient, or the label where that
    is known; an example counts where the largest entry of q exceeds the threshold.

    Args:
      weak_logits: [..., C] floating point, of lightly changed inputs.
      strong_logits: [..., C], of strongly changed ones.
      labels: [...] integer; read where `known`.
      known: [...] bool.
      class_mask: [C] or [..., C] bool, True = the class takes part; None = all do.
      threshold: of the confidence of a target.

    Returns:
      (losses [...] float32, zero where an example does not count; whether it counts
      [...] bool): `weighted_mean` of both is the mean over those that count.

    Raises:
      ValueError: if shapes or dtypes do not fit, or labels come without `known`.

    **Follows**: Sohn et al. 2020, "FixMatch", with soft targets and trusted examples
    of Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned
    Anisotropic Scaling", section on test-time adaptation.
    **Differs**: as described there; in the released code every example keeps its first
    label.

    >>> import jax.numpy as jnp
    >>> weak = jnp.array([[9.0, 0.0], [1.0, 0.0]])
    >>> losses, counts = fixmatch(weak, jnp.zeros((2, 2)))
    >>> losses.round(3).tolist(), counts.tolist()
    ([0.6930000185966492, 0.0], [True, False])
    """
    if weak_logits.shape != strong_logits.shape:
        raise ValueError(
            f"fixmatch: weak_logits are {weak_logits.shape}, strong_logits "
            f"{strong_logits.shape}"
        )
    if (labels is None) != (known is None):
        raise ValueError("fixmatch: wants labels and known, or neither")
    log_q = log_softmax("fixmatch", jax.lax.stop_gradient(weak_logits), class_mask)
    target = jnp.exp(log_q)
    if labels is not None and known is not None:
        check_labels("fixmatch", weak_logits, labels)
        one_hot = jax.nn.one_hot(labels, target.shape[-1], dtype=target.dtype)
        target = jnp.where(known[..., None], one_hot, target)
    counts = jnp.max(target, axis=-1) > threshold
    log_p = log_softmax("fixmatch", strong_logits, class_mask)
    log_p = jnp.where(jnp.isfinite(log_p), log_p, 0)
    return jnp.where(counts, -jnp.sum(target * log_p, axis=-1), 0), counts


def trusted(
    probabilities: chex.Array, per_class: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to trust a model's own labels on: the surest of every class.

    Args:
      probabilities: [N, C], of a model that was not adapted yet.
      per_class: k, rows that each class puts forward; by default
        `min(N // C // 10, 100)`, at least one.

    Returns:
      (rows [M] in ascending order, each once, M <= k C; their predicted classes [M]),
      int64.

    Raises:
      ValueError: if the shape does not fit, or k is not between 1 and N.

    **Follows**: Zhang et al. 2024, "Knowledge Composition using Task Vectors with
    Learned Anisotropic Scaling", section on test-time adaptation.

    >>> rows, labels = trusted(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), 1)
    >>> rows.tolist(), labels.tolist()
    ([0, 2], [0, 1])
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size:
        raise ValueError(f"trusted: wanted [N, C], found {probabilities.shape}")
    count, classes = probabilities.shape
    if per_class is None:
        per_class = max(1, min(count // classes // 10, 100))
    if not 1 <= per_class <= count:
        raise ValueError(f"trusted: per_class is {per_class}, there are {count} rows")
    order = np.argsort(-probabilities, axis=0, kind="stable")[:per_class]
    rows = np.unique(order)
    return rows, probabilities[rows].argmax(1)
