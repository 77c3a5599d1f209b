"""Every example an objective of its own."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import gram_of
from mtl_jax.transforms.aggregation._engines import (
    LossFn,
    Pullback,
    task_rows,
    task_vjp,
)


def value_and_instance_gramian(
    loss_fn: LossFn, *, chunk: int | None = None, has_aux: bool = False
) -> Callable[..., tuple[Any, chex.Array, Pullback]]:
    """Losses of examples, the Gramian of their gradients, and the way back.

    Instance-wise risk minimisation (Quinton and Rey 2024, arXiv:2406.16232) and, with
    several losses an example, instance-wise multi-task learning: any method of
    `aggregation.weights` balances the B T objectives of a batch of B. The gradient of
    an example comes from that example alone, so that all of them cost T backward
    passes, where `value_and_gramian` on a vector of losses takes B T passes through the
    whole batch. What couples examples, such as statistics of the batch, is for
    `value_and_gramian`. The gradients themselves, for methods that want them,
    are `jax.vmap(jax.grad(loss_fn), (None, 0))`.

    Args:
      loss_fn: `loss_fn(params, example, *args) -> loss []` or losses [T], or a pair
        with aux; the example without its leading axis.
      chunk: examples whose gradients are held at once, a divisor of B; default all.
        Memory falls from B to 2 `chunk` gradients for T losses each, and every
        gradient is made 1 + B / chunk times.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `fn(params, batch, *args) -> (losses, gram, pullback)`, with `(losses, aux)` first
      where there is aux; leaves of `batch` and of aux are [B, ...]. Losses [B] or
      [B, T]; gram [B T, B T] float32, objective t of example b at b T + t;
      `pullback(weights [B T])` the gradient `sum_i weights[i] * grads[i]`, leaves like
      `params`.

    Raises:
      ValueError: a batch whose leaves do not share one leading axis of 1 or more;
        losses that are not floating point, or of more than one axis; a chunk that does
        not divide B; a leaf of params that is not floating point.

    >>> fn = value_and_instance_gramian(lambda w, x: x @ w)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> losses, gram, pullback = fn(jnp.ones(2), x)
    >>> losses.tolist(), gram.tolist()
    ([3.0, 7.0], [[5.0, 11.0], [11.0, 25.0]])
    >>> pullback(jnp.array([1.0, -1.0])).tolist()
    [-2.0, -2.0]
    """
    name = "value_and_instance_gramian"

    def fn(params, batch, *args):
        count = _examples(name, batch)
        size = _chunk(name, chunk, count)

        def of_one(params, example):
            out = loss_fn(params, example, *args)
            losses, aux = out if has_aux else (out, None)
            return _vector(name, losses), (losses, aux)

        def of_all(params):
            flat, kept = jax.vmap(of_one, (None, 0))(params, batch)
            return flat.reshape(-1), kept

        def rows(part):
            found = jax.vmap(lambda example: _grads(name, of_one, params, example))(
                part
            )
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

        losses, (shaped, aux), pullback = task_vjp(name, of_all, params, (), True)
        losses = losses.reshape(shaped.shape)
        gram = gram_of(name, _gramian(rows, batch, count, size))
        return ((losses, aux) if has_aux else losses), gram, pullback

    return fn


def _grads(name, loss_fn, params, example):
    """Gradients of one example, leaves [T, ...]."""
    losses, _, pullback = task_vjp(name, loss_fn, params, (example,), True)
    return task_rows(pullback, losses, engine="vmap")


def _gramian(rows, batch, count, size):
    """Inner products of all gradients, `size` examples against `size` at a time."""
    if size == count:
        return tree.gram(rows(batch))
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)

    # Loops on every backend: to hold few gradients is what they are for.
    def against_all(part):
        own = rows(part)
        return jax.lax.map(lambda other: tree.gram(own, rows(other)), parts)

    blocks = jax.lax.map(against_all, parts)
    side = blocks.shape[0] * blocks.shape[2]
    gram = blocks.swapaxes(1, 2).reshape(side, side)
    return (gram + gram.T) / 2


def _vector(name, losses):
    shape = getattr(losses, "shape", None)
    if shape is None or len(shape) > 1:
        found = type(losses).__name__ if shape is None else shape
        raise ValueError(
            f"{name}: the losses of one example are {found}, wanted [] or [T]"
        )
    return losses.reshape(-1)


def _examples(name: str, batch: Any) -> int:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or not all(counts.pop() or (0,)):
        raise ValueError(
            f"{name}: the leaves of the batch are {shapes}, wanted one leading axis "
            "of 1 or more examples"
        )
    return shapes[0][0]


def _chunk(name: str, chunk: int | None, count: int) -> int:
    if chunk is None:
        return count
    if chunk < 1 or count % chunk:
        raise ValueError(
            f"{name}: chunk is {chunk}, wanted a divisor of the {count} examples"
        )
    return chunk
