"""IMTL-G, an update with equal projections on all task gradients."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import Aggregator, from_gramian, stateless
from mtl_jax.transforms.aggregation._cosine import cosine_gram, equal_projections


def weights(gram: chex.Array) -> chex.Array:
    r"""Weights of sum one whose update projects equally on each unit gradient.

    With U the cosines and n the norms, `gram = diag(n) U diag(n)`,

      w[t] = a[t] / sum(a),  a = U^+ 1 / n.

    Args:
      gram: [T, T], inner products of task gradients.

    Returns:
      [T] float32, of sum one; zeros where no direction projects on all tasks (or the
      coefficients cancel). A zero gradient gets weight zero.

    Raises:
      ValueError: `gram` is not square.

    **Follows**: Liu et al. 2021, "Towards Impartial Multi-Task Learning", eq. 6, whose
      closed form this is wherever that form exists.
    **Differs**: for linearly dependent gradients, where the paper inverts a singular
      matrix, the projections are as equal as they can be in least squares. They are
      compared between unit gradients, so that scaling one task scales its weight back
      and leaves the direction, as in the regular case.

    >>> found = weights(jnp.diag(jnp.array([4.0, 1.0])))
    >>> print(*(f"{x:.2f}" for x in found))
    0.33 0.67
    """
    cosines, _, inverse = cosine_gram("imtl_g", gram)
    active = jnp.where(inverse != 0, 1, 0).astype(cosines.dtype)
    coefficients, _ = equal_projections(cosines, active)
    # The largest inverse norm out first: sums of 1e15 and of 1e-15 are both fine.
    largest = jnp.max(inverse)
    raw = coefficients * (inverse / jnp.where(largest == 0, 1, largest))
    total = jnp.sum(raw)
    cancels = jnp.abs(total) <= 1e-6 * jnp.sum(jnp.abs(raw))
    return jnp.where(cancels, 0, raw / jnp.where(cancels, 1, total))


def imtl_g() -> Aggregator:
    """Aggregates by IMTL-G; see `weights.imtl_g`. Updates: leaves [T, ...] -> [...].

    >>> tx = imtl_g()
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    0.67 0.67
    """
    return from_gramian("imtl_g", stateless(weights))
