"""Tasks that a batch lacks, for methods that take a zero gradient for a wish."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._solvers import project_simplex


def present_of(name: str, present: chex.Array, count: int) -> chex.Array:
    """Which tasks are there, bool [T].

    Raises:
      ValueError: the shape is not [T].
    """
    present = jnp.asarray(present)
    if present.shape != (count,):
        raise ValueError(f"{name}: present is {present.shape}, wanted ({count},)")
    return present.astype(bool)


def stand_ins(present: chex.Array) -> chex.Array:
    """For every task itself, and for an absent one the first that is present.

    With rows and columns of a Gramian taken in this order, combinations of tasks are
    those of the present ones: a gradient that is there twice adds none. Weights go
    back by `jnp.zeros(T).at[stand_ins].add(weights)`.

    Args:
      present: bool [T].

    Returns:
      int32 [T].

    >>> stand_ins(jnp.array([False, True, True])).tolist()
    [1, 1, 2]
    """
    tasks = jnp.arange(present.shape[0], dtype=jnp.int32)
    return jnp.where(present, tasks, jnp.argmax(present).astype(jnp.int32))


def project_present(
    vector: chex.Array, last: chex.Array, present: chex.Array | None
) -> chex.Array:
    """Projects on the simplex; absent tasks keep the weight that they had.

    Args:
      vector: [T], to be projected.
      last: [T], on the simplex.
      present: bool [T]; None for all.

    >>> project_present(
    ...     jnp.array([0.5, 2.0, 0.0]),
    ...     jnp.array([0.25, 0.25, 0.5]),
    ...     jnp.array([True, True, False]),
    ... ).tolist()
    [0.0, 0.5, 0.5]
    """
    if present is None:
        return project_simplex(vector)
    left = jnp.sum(jnp.where(present, last, 0))
    # Far enough below all others that the projection gives it nothing.
    lowest = jnp.min(jnp.where(present, vector, jnp.inf)) - 2
    found = project_simplex(jnp.where(present, vector, lowest), left)
    return jnp.where(present, found, last)
