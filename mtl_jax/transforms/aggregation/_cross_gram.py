"""Inner products between the task gradients of two batches."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree

_BLOCK = 8192


def _dense(a: chex.Array, b: chex.Array) -> chex.Array:
    axes = tuple(range(1, a.ndim))
    return jax.lax.dot_general(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        ((axes, axes), ((), ())),
        precision="highest",
    )


def _blocked(a: chex.Array, b: chex.Array) -> chex.Array:
    """As `_dense`, by slices of the flat view: fast where memory is cached."""
    a, b = (x.reshape(x.shape[0], -1) for x in (a, b))
    blocks = a.shape[1] // _BLOCK

    def add(i, total):
        at = (0, i * _BLOCK)
        parts = (jax.lax.dynamic_slice(x, at, (x.shape[0], _BLOCK)) for x in (a, b))
        return total + _dense(*parts)

    rest = _dense(a[:, blocks * _BLOCK :], b[:, blocks * _BLOCK :])
    return jax.lax.fori_loop(0, blocks, add, rest)


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

    >>> second = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> cross_gram({"w": jnp.eye(2)}, second).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    tree.num_tasks("cross_gram", first)
    tree.check_match(
        "cross_gram", first, second, reference_name="first", other_name="second"
    )

    def leaf(a, b):
        # Slicing a flat view would gather a sharded leaf; one device shards nothing.
        if jax.device_count() > 1 or a[0].size <= _BLOCK:
            return _dense(a, b)
        return jax.lax.platform_dependent(a, b, cpu=_blocked, default=_dense)

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    found = [leaf(a, b) for a, b in pairs if tree.is_inexact(a)]
    if not found:
        raise ValueError("cross_gram: the trees have no floating point leaf")
    return sum(found[1:], found[0])
