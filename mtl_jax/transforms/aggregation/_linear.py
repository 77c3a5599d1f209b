"""Fixed weights: what every method is compared with."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)


def mean_weights(gram: chex.Array) -> chex.Array:
    """1 / T for every task.

    Args:
      gram: [T, T]; only its shape is read.

    Returns:
      [T] float32.

    >>> mean_weights(jnp.eye(4)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    count = gram_of("mean", gram).shape[0]
    return jnp.full(count, 1 / count, jnp.float32)


def sum_weights(gram: chex.Array) -> chex.Array:
    """One for every task: the gradient of the summed loss.

    Args:
      gram: [T, T]; only its shape is read.

    Returns:
      [T] float32.

    >>> sum_weights(jnp.eye(2)).tolist()
    [1.0, 1.0]
    """
    return jnp.ones(gram_of("sum", gram).shape[0], jnp.float32)


def mean() -> Aggregator:
    """Averages the task gradients. Updates: leaves [T, ...] -> [...].

    >>> method, grads = mean(), {"w": jnp.array([[1.0], [3.0]])}
    >>> method.update(grads, method.init(None))[0]["w"].tolist()
    [2.0]
    """
    return from_gramian("mean", stateless(mean_weights, reads=()))


def sum() -> Aggregator:
    """Adds the task gradients. Updates: leaves [T, ...] -> [...].

    >>> method, grads = sum(), {"w": jnp.array([[1.0], [3.0]])}
    >>> method.update(grads, method.init(None))[0]["w"].tolist()
    [4.0]
    """
    return from_gramian("sum", stateless(sum_weights, reads=()))
