"""UPGrad, every task's gradient projected to a direction without conflict."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation import _solvers
from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)
from mtl_jax.transforms.aggregation._dual_proj import (
    check_regularization,
    regularized,
    wanted,
)


def weights(
    gram: chex.Array,
    preference: chex.Array | None = None,
    *,
    regularization: float = 1e-4,
) -> chex.Array:
    r"""Weights of the preferred mix of all gradients, each projected by itself.

      w = sum_i v_i,   v_i = argmin_v v^T (G / trace(G) + eps I) v
                             such that   v >= p[i] e_i

    Args:
      gram: [T, T], inner products of task gradients.
      preference: p, [T], non-negative; 1 / T each where not given.
      regularization: eps. Gradients shorter than about its root, against all others
        together, are not protected.

    Returns:
      [T] float32, at least `preference`.

    Raises:
      ValueError: `gram` is not square, `preference` does not fit, or
        `regularization` is not positive.

    **Follows**: Quinton, Rey 2024, "Jacobian Descent For Multi-Objective
      Optimization", prop. 1 and sec. 3.
    **Differs**: the Gramian is scaled whatever its size; TorchJD takes gradients
      with a squared norm below 1e-4 for zero.

    >>> [round(x, 3) for x in weights(jnp.array([[1.0, -0.5], [-0.5, 1.0]])).tolist()]
    [0.75, 0.75]
    """
    check_regularization("upgrad", regularization)
    gram = gram_of("upgrad", gram)
    lower = jnp.diag(wanted("upgrad", preference, gram))
    matrix = regularized(gram, regularization)
    found = _solvers.quadratic_above(matrix, lower, ridge=regularization)
    return jnp.sum(found, 0)


def upgrad(
    preference: chex.Array | None = None, *, regularization: float = 1e-4
) -> Aggregator:
    """Aggregates by UPGrad; see `weights.upgrad`.

    Updates: leaves [T, ...] -> [...].

    Args:
      preference: [T], non-negative; 1 / T each where not given.
      regularization: added to the diagonal of the Gramian of trace one.

    Raises:
      ValueError: `regularization` is not positive; in updates, `preference` does not
        fit.

    >>> tx = upgrad()
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.4, 0.7]
    """
    check_regularization("upgrad", regularization)

    def weigh(gram):
        return weights(gram, preference, regularization=regularization)

    return from_gramian("upgrad", stateless(weigh))
