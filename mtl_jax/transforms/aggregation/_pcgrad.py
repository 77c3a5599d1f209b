"""PCGrad, gradient surgery by projecting conflicts away."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
)
from mtl_jax.transforms.aggregation._cosine import Cosines, cosine_gram

# (visited tasks [T], products with them [T], squared lengths [T]) -> (amounts, seen)
Push = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, chex.Array]]


def random_orders(key: chex.PRNGKey, count: int) -> chex.Array:
    """One random order of all tasks per task, [T, T] int32: row i is task i's."""
    # The index rides in the low bits of a random number: one sort, nothing to gather.
    low = jnp.uint32((1 << max(count - 1, 1).bit_length()) - 1)
    drawn = jax.random.bits(key, (count, count), jnp.uint32) & ~low
    mixed = drawn | jnp.arange(count, dtype=jnp.uint32)[None, :]
    return (jnp.sort(mixed, axis=1) & low).astype(jnp.int32)


def visit_tasks(
    gram: Cosines, orders: chex.Array, push: Push
) -> tuple[chex.Array, chex.Array]:
    """Lets every task's gradient meet those of the others, one after the other.

    Task i keeps a running vector, at first its unit gradient. For each j in its order
    a multiple of the unit gradient of j is added to the vector. Only inner products are
    kept, never the vectors.

    Args:
      gram: of the task gradients, split.
      orders: [T, T] int; row i is the order in which task i visits.
      push: decides the multiples, for all running vectors at once, from the visited
        tasks, the products of the running vectors with their unit gradients, and the
        squared lengths of the running vectors. What else it returns is collected.

    Returns:
      weights [T] of the sum of all running vectors, each times the length that its
      gradient had, and what was seen, [T, T]: entry i, j at task i's visit to task j;
      its diagonal means nothing.
    """
    cosines, norms, inverse = gram
    squares = jnp.diag(cosines)
    tasks = jnp.arange(norms.shape[0])

    def visit(carry, others):
        products, squares = carry
        met = jnp.take_along_axis(products, others[:, None], 1)[:, 0]
        amounts, seen = push(others, met, squares)
        amounts = jnp.where(others == tasks, 0, amounts)
        squares = squares + 2 * amounts * met + amounts * amounts
        products = products + amounts[:, None] * jnp.take(cosines, others, 0)
        return (products, jnp.maximum(squares, 0)), (amounts, seen)

    steps = orders.T
    _, (amounts, seen) = jax.lax.scan(visit, (cosines, squares), steps)
    added = amounts * norms[None, :] * jnp.take(inverse, steps)
    weights = jnp.asarray(1 + 0 * norms).at[steps].add(added)
    return weights, jnp.zeros_like(cosines).at[tasks[None, :], steps].set(seen)


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
    split = cosine_gram("pcgrad", gram)
    orders = random_orders(key, len(split.norms))
    return visit_tasks(split, orders, lambda _, met, __: (-jnp.minimum(met, 0), met))[0]


def pcgrad(*, seed: int = 0) -> Aggregator:
    """Aggregates by PCGrad; see `weights.pcgrad`.

    Updates: leaves [T, ...] -> [...]. State: a typed PRNG key.

    Args:
      seed: of the random orders.

    >>> tx = pcgrad(seed=0)
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.8, 1.4]
    """

    def weigh(gram, key, **extra):
        del extra
        key, use = jax.random.split(key)
        return weights(gram, use), key

    return from_gramian("pcgrad", Rule(lambda: jax.random.key(seed), weigh))
