"""PCGrad, gradient surgery by projecting conflicts away."""

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)


def weights(gram: chex.Array, key: chex.PRNGKey) -> chex.Array:
    r"""Weights w with `sum_t w[t] g_t` equal to the sum of projected gradients.

    For each task i, visit the other tasks j in random order; where the running
    gradient conflicts with g_j, remove its component along g_j. In coefficients c
    (starting at e_i) this is

      c[j] <- c[j] - min(0, c^T G[:, j]) / G[j, j].

    Args:
      gram: [T, T], inner products of task gradients.
      key: typed PRNG key; one independent order per task.

    Returns:
      [T] float32, each at least 1.

    Raises:
      ValueError: `gram` is not square.

    **Follows**: Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", alg. 1.
    **Differs**: a zero gradient (G[j, j] = 0) projects nothing; the authors' code
      divides by zero there.

    >>> weights(jnp.array([[1.0, -0.5], [-0.5, 1.0]]), jax.random.key(0)).tolist()
    [1.5, 1.5]
    """
    gram = gram_of("pcgrad", gram)
    count = gram.shape[0]
    norms = jnp.diag(gram)
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)

    def project(row, order):
        def visit(c, j):
            conflict = jnp.where(j == row, 0, jnp.minimum(c @ gram[:, j], 0))
            return c.at[j].add(-conflict * inverse[j]), None

        start = (jnp.arange(count) == row).astype(gram.dtype)
        return jax.lax.scan(visit, start, order)[0]

    keys = jax.random.split(key, count)
    orders = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)
    return jnp.sum(jax.vmap(project)(jnp.arange(count), orders), 0)


def pcgrad(*, seed: int = 0) -> Aggregator:
    """Aggregates by PCGrad; see `weights.pcgrad`.

    Updates: leaves [T, ...] -> [...]. State: a typed PRNG key.

    Args:
      seed: of the random orders.
    """

    def weigh(gram, key, **extra):
        del extra
        key, use = jax.random.split(key)
        return weights(gram, use), key

    return from_gramian("pcgrad", Rule(lambda: jax.random.key(seed), weigh))
