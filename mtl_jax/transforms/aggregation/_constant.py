"""Weights given once and for all: tuned scalarisation."""

from typing import Any

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)


def weights(gram: chex.Array, values: Any) -> chex.Array:
    """The given weights.

    Args:
      gram: [T, T]; only its shape is read.
      values: [T].

    Returns:
      [T] float32.

    Raises:
      ValueError: `values` is not [T].

    >>> weights(jnp.eye(2), [0.25, 0.75]).tolist()
    [0.25, 0.75]
    """
    count = gram_of("constant", gram).shape[0]
    values = jnp.asarray(values, jnp.float32)
    if values.shape != (count,):
        raise ValueError(
            f"constant: weights are {values.shape}, wanted ({count},), one per task"
        )
    return values


def constant(values: Any) -> Aggregator:
    """Aggregates with fixed weights. Updates: leaves [T, ...] -> [...].

    Args:
      values: [T], one weight per task.

    >>> tx = constant([1.0, 10.0])
    >>> grads = {"w": jnp.array([[1.0], [2.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(1)}))[0]["w"].tolist()
    [21.0]
    """
    rule = stateless(lambda gram: weights(gram, values), reads=())
    return from_gramian("constant", rule)
