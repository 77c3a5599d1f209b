"""State of the shape of the task gradients: zeros, updates, lengths."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree


def zeros(params: Any, num_tasks: int) -> Any:
    """Zeros [T, ...] for each leaf of params, in float32 or wider."""
    return jax.tree.map(
        lambda p: jnp.zeros((num_tasks, *jnp.shape(p)), tree.wide_dtype(p.dtype)),
        params,
    )


def check_count(name: str, task_grads: Any, num_tasks: int) -> None:
    """Refuses task gradients of another number of tasks than announced.

    Raises:
      ValueError: naming both.
    """
    count = tree.num_tasks(name, task_grads)
    if count != num_tasks:
        raise ValueError(f"{name}: {count} tasks, wanted num_tasks = {num_tasks}")


def per_task(values: chex.Array, leaf: chex.Array) -> chex.Array:
    """[T] shaped to go with a leaf [T, ...]."""
    return values.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)


def track(state: Any, task_grads: Any, update: Callable[..., chex.Array]) -> Any:
    """`update(state leaf, gradient leaf in the state's dtype)` on inexact leaves."""
    return jax.tree.map(
        lambda s, g: update(s, g.astype(s.dtype)) if tree.is_inexact(g) else s,
        state,
        task_grads,
    )


def squares(task_grads: Any) -> chex.Array:
    """Squared length of each task's gradient, [T] float32."""

    def leaf(x):
        axes = tuple(range(1, x.ndim))
        return jax.lax.dot_general(
            x,
            x,
            ((axes, axes), ((0,), (0,))),
            precision="highest",
            preferred_element_type=jnp.float32,
        )

    found = [leaf(x) for x in jax.tree.leaves(task_grads) if tree.is_inexact(x)]
    return sum(found[1:], found[0])


def cast_like(out: Any, task_grads: Any) -> Any:
    """Leaves [...] in the dtypes of the leaves [T, ...]; inexact ones only computed."""
    return jax.tree.map(
        lambda x, g: x.astype(g.dtype) if tree.is_inexact(g) else g[0], out, task_grads
    )
