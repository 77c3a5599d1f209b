"""DualProj (GEM), the preferred mix moved to the nearest direction without conflict."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation import _solvers
from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)
from mtl_jax.transforms.aggregation._cosine import preference_of


def wanted(name: str, preference: chex.Array | None, gram: chex.Array) -> chex.Array:
    """The preference vector [T] that fits `gram`: 1 / T each where None."""
    count = gram.shape[0]
    if preference is None:
        return jnp.full(count, 1 / count, gram.dtype)
    return preference_of(name, preference, count, gram.dtype)


def regularized(gram: chex.Array, regularization: float) -> chex.Array:
    """`G / trace(G) + regularization I`; the first term is zero where G is."""
    largest = jnp.max(jnp.diag(gram))
    gram = gram / jnp.where(largest == 0, 1, largest)
    trace = jnp.trace(gram)
    gram = gram / jnp.where(trace == 0, 1, trace)
    return gram + regularization * jnp.eye(gram.shape[0], dtype=gram.dtype)


def check_regularization(name: str, regularization: float) -> None:
    """Refuses what makes the quadratic program singular.

    Raises:
      ValueError: the regularization is not positive.
    """
    if not regularization > 0:
        raise ValueError(
            f"{name}: regularization is {regularization}, wanted a positive number"
        )


def weights(
    gram: chex.Array,
    preference: chex.Array | None = None,
    *,
    regularization: float = 1e-4,
) -> chex.Array:
    r"""Weights of `sum_t p[t] g_t`, projected to where no task objects.

      min_v v^T (G / trace(G) + eps I) v   such that   v >= p

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

    **Follows**: Lopez-Paz, Ranzato 2017, "Gradient Episodic Memory", eq. 11, in the
      dual, as Quinton, Rey 2024, "Jacobian Descent", define it for task gradients.
    **Differs**: the Gramian is scaled whatever its size; TorchJD takes gradients
      with a squared norm below 1e-4 for zero.

    >>> gram = jnp.array([[1.0, -0.5], [-0.5, 0.25]])
    >>> found = weights(gram, preference=jnp.array([1.0, 0.0]))
    >>> [round(x, 3) for x in found.tolist()]
    [1.0, 1.999]
    """
    check_regularization("dual_proj", regularization)
    gram = gram_of("dual_proj", gram)
    lower = wanted("dual_proj", preference, gram)
    matrix = regularized(gram, regularization)
    return _solvers.quadratic_above(matrix, lower[None], ridge=regularization)[0]


def dual_proj(
    preference: chex.Array | None = None, *, regularization: float = 1e-4
) -> Aggregator:
    """Aggregates by DualProj; see `weights.dual_proj`.

    Updates: leaves [T, ...] -> [...].

    Args:
      preference: [T], non-negative; 1 / T each where not given.
      regularization: added to the diagonal of the Gramian of trace one.

    Raises:
      ValueError: `regularization` is not positive; in updates, `preference` does not
        fit.

    >>> tx = dual_proj()
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.25, 0.5]
    """
    check_regularization("dual_proj", regularization)

    def weigh(gram):
        return weights(gram, preference, regularization=regularization)

    return from_gramian("dual_proj", stateless(weigh))
