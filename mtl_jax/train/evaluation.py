"""Evaluation: sums of per-example values over a data set, ragged end included."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding

PredictFn = Callable[..., dict[str, chex.Array]]


def evaluate(
    predict_fn: PredictFn,
    batches: Iterable[Any],
    *,
    params: Any = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Means of per-example values over all examples, each counted once.

    A batch smaller than the first one is filled up to its size (and to a multiple of
    the data axis) with copies that count for nothing, so one compilation serves all.
    That compilation is kept with `predict_fn`: hand in the same function object, and
    what changes from call to call through `params`.

    Args:
      predict_fn: `predict_fn(batch)`, or `predict_fn(params, batch)` when `params` are
        given; returns a dict of arrays [B], such as `{"accuracy": label == guess}`.
      batches: trees of arrays [B, ...]; read to the end.
      params: first argument of `predict_fn`.
      mesh: split every batch over its axis "data"; None computes on one device.

    Returns:
      The mean of every value, and the number of examples under `count`.

    Raises:
      ValueError: when there are no batches, when a value is not [B] or not finite, or
        when batches differ in more than their size.

    >>> batches = [{"x": np.arange(4.0)}, {"x": np.arange(3.0)}]
    >>> evaluate(lambda b: {"mean": b["x"]}, batches)
    {'mean': 1.2857142857142858, 'count': 7}
    """
    if mesh is not None:
        sharding.check_mesh("evaluate", mesh)
    parts = 1 if mesh is None else mesh.shape[sharding.DATA]
    width, count = 0, 0
    totals: dict[str, float] = {}
    predict = _compiled(predict_fn)
    for number, batch in enumerate(batches):
        size = _size(batch)
        width = width or -(-size // parts) * parts
        if size > width:
            raise ValueError(
                f"evaluate: batch {number} has {size} examples, the first had {width}"
            )
        weight = np.arange(width) < size
        padded = {"batch": _pad(batch, size, width), "weight": weight}
        if mesh is not None:
            padded = sharding.shard_batch(mesh, padded)
        args = (padded["batch"],) if params is None else (params, padded["batch"])
        sums = jax.device_get(predict(padded["weight"], *args))
        for name, total in sums.items():
            if not np.isfinite(total):
                raise ValueError(f"evaluate: {name!r} is not finite in batch {number}")
            totals[name] = totals.get(name, 0.0) + float(total)
        count += size
    if not count:
        raise ValueError("evaluate: there are no batches")
    return {name: total / count for name, total in totals.items()} | {"count": count}


def evaluate_tasks(
    predict_fn: PredictFn | Mapping[str, PredictFn],
    tasks: Mapping[str, Iterable[Any]],
    *,
    params: Any = None,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, float]]:
    """`evaluate` for every task.

    Args:
      predict_fn: one function for all tasks, or one for each by name.
      tasks: batches of every task by name.
      params: first argument of `predict_fn`.
      mesh: as in `evaluate`.

    Returns:
      The result of `evaluate` by task, in the order of `tasks`.

    Raises:
      ValueError: when a task has no function, and as `evaluate` does, naming the task.
    """
    found = {}
    for name, batches in tasks.items():
        each = predict_fn
        if isinstance(predict_fn, Mapping):
            if name not in predict_fn:
                raise ValueError(
                    f"evaluate_tasks: no predict_fn for task {name!r}, "
                    f"found {sorted(predict_fn)}"
                )
            each = predict_fn[name]
        try:
            found[name] = evaluate(each, batches, params=params, mesh=mesh)
        except ValueError as error:
            raise ValueError(f"evaluate_tasks: task {name!r}: {error}") from error
    return found


@functools.lru_cache(maxsize=64)
def _compiled(predict_fn: PredictFn) -> Callable[..., dict[str, chex.Array]]:
    @jax.jit
    def sums(weight, *args):
        values = predict_fn(*args)
        if not isinstance(values, dict) or "count" in values:
            found = (
                sorted(values) if isinstance(values, dict) else type(values).__name__
            )
            raise ValueError(
                "evaluate: predict_fn wants to return a dict of arrays [B] without a "
                f"'count', found {found}"
            )
        for name, value in values.items():
            if jnp.shape(value) != weight.shape:
                raise ValueError(
                    f"evaluate: {name!r} of predict_fn wants shape "
                    f"{weight.shape}, found {jnp.shape(value)}"
                )
        return {
            name: jnp.sum(jnp.where(weight, jnp.asarray(value, jnp.float32), 0))
            for name, value in values.items()
        }

    return sums


def _size(batch: Any) -> int:
    sizes = {
        mtl_tree.path_str(path): x.shape[0]
        for path, x in jax.tree_util.tree_leaves_with_path(batch)
        if np.ndim(x)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"evaluate: leaves want one number of examples, found {sizes}")
    return next(iter(sizes.values()))


def _pad(batch: Any, size: int, width: int) -> Any:
    if size == width:
        return batch

    def leaf(x):
        if not np.ndim(x):
            return x
        x = np.asarray(x)
        return np.concatenate([x, np.repeat(x[:1], width - size, axis=0)])

    return jax.tree.map(leaf, batch)
