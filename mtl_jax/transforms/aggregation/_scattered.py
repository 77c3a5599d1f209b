"""Per-task gradients inside `shard_map`, split over the devices as they are made."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation._engines import (
    ROWS,
    LossFn,
    check_engine,
    task_rows,
    task_vjp,
    value_of,
)


def value_and_scattered_grads(
    loss_fn: LossFn,
    axis_name: str,
    *,
    engine: str = "auto",
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """Task gradients inside `shard_map`, each device keeping one slice of every row.

    For methods that need the gradients themselves where parameters are replicated and
    the batch is split over `axis_name`. Rows are reduce-scattered as they are made, so
    no device ever holds [T, P]. A Gramian is `jax.lax.psum(tree.gram(slices), axis)`.

    Args:
      loss_fn: as above; a mean over the examples of the device.
      axis_name: the mapped axis, all of whose devices hold the same parameters.
      engine: "map", "vmap" or "auto" (map).
      has_aux: whether `loss_fn` returns a pair; aux stays the device's own.

    Returns:
      `fn(params, *args) -> (losses, slices)`, or `((losses, aux), slices)`: losses [T]
      averaged over the axis; leaves of slices [T, ceil(n / D)], this device's part of
      the averaged rows, flattened and padded with zeros to D equal parts.
      `unscatter(slices, params)` outside of `shard_map` gives the leaves their shapes.

    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    >>> fn = jax.shard_map(
    ...     value_and_scattered_grads(lambda w, x: jnp.mean(x * w, 0), "data"),
    ...     mesh=mesh,
    ...     in_specs=(jax.P(), jax.P("data")),
    ...     out_specs=(jax.P(), jax.P(None, "data")),
    ... )
    >>> jax.jit(fn)(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]]))[1].tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    name = "value_and_scattered_grads"
    check_engine(name, engine, ROWS)

    def fn(params, *args):
        size = jax.lax.axis_size(axis_name)
        # Without the cast, the transpose would already add over the axis: see the
        # test that compares with one device.
        local = jax.tree.map(
            lambda p: jax.lax.pcast(p, axis_name, to="varying"), params
        )
        losses, aux, pullback = task_vjp(name, loss_fn, local, args, has_aux)

        def scatter(x):
            x = jnp.pad(x.reshape(-1), (0, -x.size % size))
            wide = x.astype(tree.wide_dtype(x.dtype))
            mean = jax.lax.psum_scatter(wide, axis_name, tiled=True) / size
            return mean.astype(x.dtype)

        slices = task_rows(
            lambda e: jax.tree.map(scatter, pullback(e)), losses, engine=engine
        )
        return value_of(jax.lax.pmean(losses, axis_name), aux, has_aux), slices

    return fn


def unscatter(flat: Any, params: Any) -> Any:
    """Gives flat, padded leaves the shapes of `params`.

    Args:
      flat: tree with leaves [..., n or more].
      params: tree whose leaves have n elements.

    Returns:
      Tree with leaves [..., *shape].

    >>> unscatter(jnp.arange(8.0), jnp.zeros((2, 3))).shape
    (2, 3)
    """
    return jax.tree.map(
        lambda x, p: x[..., : p.size].reshape(*x.shape[:-1], *p.shape), flat, params
    )
