"""Microbatches: a batch that is too large for one backward pass, in parts."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding
from mtl_jax.transforms import loops


def mean_over_microbatches(
    fn: Callable[[Any, chex.PRNGKey], tuple[Any, Any]],
    batch: Any,
    key: chex.PRNGKey,
    mesh: Mesh,
    accumulate: int,
) -> tuple[Any, Any]:
    """Runs `fn(batch, key) -> (values, grads)` on equal parts, one after another.

    Returns:
      The means; those of `grads` are formed in float32 and cast once. Part n draws from
      `fold_in(key, n)`; a batch that is not split, from `key` itself.
    """
    if accumulate == 1:
        return fn(batch, key)
    parts = (jnp.arange(accumulate), split_batch(batch, mesh, accumulate))
    return mean_over_parts(fn, batch, key, parts)


def mean_over_parts(
    fn: Callable[[Any, chex.PRNGKey], tuple[Any, Any]],
    batch: Any,
    key: chex.PRNGKey,
    parts: tuple[chex.Array, Any],
) -> tuple[Any, Any]:
    """As `mean_over_microbatches`, over some parts: (their numbers, their rows)."""
    count = parts[0].shape[0]

    def run(index, rows):
        return fn(join_batch(batch, rows), jax.random.fold_in(key, index))

    def body(total, each):
        values, grads = run(*each)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), values

    first = jax.tree.map(lambda x: x[0], parts)
    like = jax.eval_shape(run, *first)[1]
    zeros = jax.tree.map(
        lambda g: jnp.zeros(g.shape, mtl_tree.wide_dtype(g.dtype)), like
    )
    total, values = loops.scan(body, zeros, parts)
    grads = jax.tree.map(lambda t, g: (t / count).astype(g.dtype), total, like)
    return jax.tree.map(lambda v: jnp.mean(v, 0), values), grads


def split_batch(batch: Any, mesh: Mesh, accumulate: int) -> Any:
    """[B, ...] -> [A, B/A, ...], no example leaving its device; None for scalars."""

    def leaf(x):
        if not x.ndim:
            return None
        x = jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
        spec = PartitionSpec(None, sharding.DATA)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(leaf, batch)


def split_blocks(batch: Any, mesh: Mesh, count: int) -> Any:
    """[T n, ...] -> [T, n, ...], block after block; None for scalars."""

    def leaf(x):
        if not x.ndim:
            return None
        x = x.reshape(count, -1, *x.shape[1:])
        spec = PartitionSpec(None, sharding.DATA)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(leaf, batch)


def join_batch(batch: Any, rows: Any) -> Any:
    """A microbatch: the rows, and the scalars of the whole batch."""
    return jax.tree.map(lambda x, r: x if r is None else r, batch, rows)


def mean_of_two(first: Any, second: Any) -> Any:
    """The mean of two trees, leaf by leaf, formed in float32 and cast once."""

    def leaf(x, y):
        wide = mtl_tree.wide_dtype(x.dtype)
        return ((x.astype(wide) + y.astype(wide)) / 2).astype(x.dtype)

    return jax.tree.map(leaf, first, second)
