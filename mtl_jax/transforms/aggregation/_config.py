"""ConFIG, an update that conflicts with no task gradient."""

from typing import Any

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import Aggregator, from_gramian, stateless
from mtl_jax.transforms.aggregation._cosine import (
    cosine_gram,
    equal_projections,
    preference_of,
)


def weights(gram: chex.Array, preference: Any = None) -> chex.Array:
    r"""Weights w with `sum_t w[t] g_t = (sum_t g_t . v) v`, v the ConFIG direction.

    With unit gradients u_t = g_t / n_t in the rows of M, the paper's direction is
    v = M^+ p / |M^+ p|. As M^+ = M^T (M M^T)^+, everything follows from the cosines
    U = M M^T: with y = U^+ p,

      M^+ p = sum_t y[t] u_t,  |M^+ p|^2 = y^T U y,  g_t . M^+ p = n[t] (U y)[t],

      w[t] = (n^T U y) / (y^T U y) * y[t] / n[t].

    Args:
      gram: [T, T], inner products of task gradients.
      preference: [T], wanted cosines up to a common factor; ones where None.

    Returns:
      [T] float32; zeros where every direction conflicts with some task. A zero gradient
      gets weight zero.

    Raises:
      ValueError: `gram` is not square, or `preference` is not [T].

    **Follows**: Liu et al. 2024, "ConFIG: Towards Conflict-free Training of Physics
      Informed Neural Networks", eq. 2.
    **Differs**: a pseudo-inverse of [T, T] in place of one of [T, P].

    >>> weights(jnp.diag(jnp.array([4.0, 1.0]))).tolist()
    [0.75, 1.5]
    """
    cosines, norms, inverse = cosine_gram("config", gram)
    count = len(norms)
    target = (
        1
        if preference is None
        else preference_of("config", preference, count, norms.dtype)
    )
    target = jnp.where(inverse != 0, target, 0).astype(norms.dtype)
    coefficients, square = equal_projections(cosines, target)
    projections = jnp.matmul(cosines, coefficients, precision="highest")
    length = jnp.sum(norms * projections) / jnp.where(square == 0, 1, square)
    return length * coefficients * inverse


def config(*, preference: Any = None) -> Aggregator:
    """Aggregates by ConFIG; see `weights.config`. Updates: leaves [T, ...] -> [...].

    Args:
      preference: [T], wanted cosines up to a common factor; ones where None.

    >>> tx = config()
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [1.5, 1.5]
    """
    return from_gramian("config", stateless(lambda gram: weights(gram, preference)))
