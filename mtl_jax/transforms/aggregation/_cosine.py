"""The Gramian without its scales, and what several methods solve on it."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import gram_of


class Cosines(NamedTuple):
    """A Gramian in two factors, `gram[i, j] = norms[i] * cosines[i, j] * norms[j]`.

    Attributes:
      cosines: [T, T]; ones on the diagonal, rows and columns of zero gradients zero.
      norms: [T], lengths of the task gradients.
      inverse: [T], `1 / norms`, zero for zero gradients.
    """

    cosines: chex.Array
    norms: chex.Array
    inverse: chex.Array


def dot(a: chex.Array, b: chex.Array) -> chex.Array:
    """`a @ b` in full float32, on accelerators too."""
    return jnp.matmul(a, b, precision="highest")


def cosine_gram(name: str, gram: Any) -> Cosines:
    """Splits a Gramian into cosines and norms; NaN and infinity become NaN.

    Raises:
      ValueError: `gram` is not square.
    """
    gram = gram_of(name, gram)
    norms = jnp.sqrt(jnp.diag(gram))
    active = norms != 0
    inverse = jnp.where(active, 1 / jnp.where(active, norms, 1), 0)
    scaled = gram * inverse[:, None] * inverse[None, :]
    diagonal = jnp.eye(len(norms), dtype=bool)
    ones = jnp.where(active, 1 + 0 * norms, 0)
    cosines = jnp.where(diagonal, ones[:, None], jnp.clip(scaled, -1, 1))
    return Cosines(cosines, norms, inverse)


def rank_cutoff(count: int, dtype: Any) -> float:
    """Eigenvalues below this share of the largest one are rounding of the Gramian."""
    return 8 * count * float(jnp.finfo(dtype).eps)


def preference_of(name: str, preference: Any, count: int, dtype: Any) -> chex.Array:
    """A preference vector as an array [T], refused in any other shape.

    Raises:
      ValueError: the shape is not [T].
    """
    preference = jnp.asarray(preference)
    if preference.shape != (count,):
        raise ValueError(
            f"{name}: preference is {preference.shape}, wanted ({count},), one per task"
        )
    return preference.astype(dtype)


def equal_projections(
    cosines: chex.Array, target: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """The shortest v whose inner product with each unit gradient is closest to target.

    Args:
      cosines: [T, T].
      target: [T].

    Returns:
      [T], coefficients y with `v = sum_t y[t] u_t`, the shortest such y; zero where
      no direction comes any closer than the zero vector. And the square of |v|.
    """
    values, vectors = jnp.linalg.eigh(cosines)
    kept = values > rank_cutoff(len(values), values.dtype) * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    along = dot(vectors.T, target)
    square = jnp.sum(inverse * along**2)
    exists = square > 1e-10 * jnp.sum(target**2)
    coefficients = dot(vectors, inverse * along)
    keep = exists | jnp.isnan(square)
    return jnp.where(keep, coefficients, 0), jnp.where(keep, square, 0)
