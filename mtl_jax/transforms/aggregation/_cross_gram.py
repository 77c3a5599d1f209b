"""Inner products between the task gradients of two batches."""

from typing import Any

import chex

from mtl_jax import tree


def cross_gram(first: Any, second: Any) -> chex.Array:
    """Inner products between the task gradients of two batches, `J1 J2^T`.

    Args:
      first: task tree, leaves [T, ...].
      second: the like, from an independent batch at the same parameters.

    Returns:
      [T, T] float32; its expectation is the Gramian of the expected gradients, which
      the Gramian of one batch overestimates by the noise. Not symmetric.

    Raises:
      ValueError: the trees do not match.

    >>> import jax.numpy as jnp
    >>> second = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> cross_gram({"w": jnp.eye(2)}, second).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    tree.num_tasks("cross_gram", first)
    tree.check_match(
        "cross_gram", first, second, reference_name="first", other_name="second"
    )
    return tree.gram(first, second)
