"""What to say, and to write down, when a step is not finite."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree as mtl_tree
from mtl_jax.train.objective import objective, task_objective
from mtl_jax.train.state import TrainState, merge
from mtl_jax.train.trainable import Trainable


class NonFiniteError(ValueError):
    """A loss or gradient was not finite; the message names where.

    Attributes:
      report: plain data: the step, its metrics, the names of the leaves of batch,
        params and gradient that hold a value that is not finite, and those of the
        tasks whose loss or its derivative is not.
    """

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report


def nonfinite_error(
    trainable: Trainable,
    state: TrainState,
    batch: Any,
    metrics: dict[str, float],
    workdir: Any = None,
) -> NonFiniteError:
    """Runs the failed step's loss again, names what is not finite, writes a dump.

    Args:
      trainable: what was being trained.
      state: the state the step began with (a failed step leaves it as it was).
      batch: the global batch of the step.
      metrics: the step's metrics on the host.
      workdir: folder that receives `nonfinite.json`, and the batch as
        `nonfinite_batch.npz` where one process holds it all; None writes nothing.

    Returns:
      The error to raise.
    """
    step = int(state.step)
    key = jax.random.fold_in(state.key, state.step)

    def gradient(params, frozen, batch):
        def loss(params):
            if trainable.aggregator is None:
                return objective(trainable.loss_fn, params, frozen, batch, key)[0]
            losses = task_objective(trainable.loss_fn, params, frozen, batch, key)[0]
            return jnp.sum(losses)

        return _flags(jax.grad(loss)(params))

    grads = jax.jit(gradient)(state.params, state.frozen, batch)
    report = {
        "step": step,
        "metrics": metrics,
        "batch": _named(jax.jit(_flags)(batch)),
        "params": _named(jax.jit(_flags)(merge(state.params, state.frozen))),
        "gradient": _named(grads),
        "tasks": _bad_tasks(trainable, state, batch, key),
    }
    bad = sorted(name for name, value in metrics.items() if not np.isfinite(value))
    parts = [f"metric {name!r} is {metrics[name]}" for name in bad]
    if report["tasks"]:
        parts.append("not finite for task: " + ", ".join(map(repr, report["tasks"])))
    for kind in ("batch", "params", "gradient"):
        if report[kind]:
            shown = ", ".join(repr(name) for name in report[kind][:4])
            more = len(report[kind]) - 4
            parts.append(
                f"not finite in {kind}: {shown}" + (f" and {more} more" * (more > 0))
            )
    if not parts:
        rule = getattr(trainable.aggregator, "rule", None)
        parts.append(
            "all is well before the update, a loss after it is not"
            if getattr(rule, "after", None) is not None
            else "no loss, gradient or metric shows where, so it is what the "
            "aggregator holds or the products of task gradients"
        )
    message = f"fit: step {step} is not finite: " + "; ".join(parts)
    if workdir is not None and jax.process_index() == 0:
        _dump(workdir, report, batch)
        message += f"; see {workdir / 'nonfinite.json'}"
    return NonFiniteError(message, report)


def _bad_tasks(
    trainable: Trainable, state: TrainState, batch: Any, key: Any
) -> list[str]:
    """Tasks whose loss, or its derivative, is not finite.

    In the backward pass, the infinite slope of one task times the zero cotangent of
    another is NaN for both; a derivative along one direction keeps tasks apart.
    """
    if trainable.aggregator is None:
        return []

    def losses(params, frozen, batch):
        return task_objective(trainable.loss_fn, params, frozen, batch, key)[0]

    def both(params, frozen, batch):
        return jax.jvp(
            lambda p: losses(p, frozen, batch),
            (params,),
            (jax.tree.map(jnp.ones_like, params),),
        )

    args = (state.params, state.frozen, batch)
    try:
        found = jax.jit(both)(*args)
    except TypeError:  # An operation without a forward mode.
        found = (jax.jit(losses)(*args),)
    good = np.all([np.isfinite(jax.device_get(x)) for x in found], 0)
    names = trainable.task_names or [str(t) for t in range(len(good))]
    return [name for name, ok in zip(names, good, strict=True) if not ok]


def _dump(workdir: Any, report: dict[str, Any], batch: Any) -> None:
    plain = report | {"metrics": {k: repr(v) for k, v in report["metrics"].items()}}
    (workdir / "nonfinite.json").write_text(json.dumps(plain, indent=2) + "\n")
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if all(getattr(x, "is_fully_addressable", True) for _, x in leaves):
        with (workdir / "nonfinite_batch.npz").open("wb") as file:
            np.savez(file, **{mtl_tree.path_str(p): np.asarray(x) for p, x in leaves})


def _flags(tree: Any) -> Any:
    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.all(jnp.isfinite(x))
        return jnp.ones((), jnp.bool_)

    return jax.tree.map(leaf, tree)


def _named(flags: Any) -> list[str]:
    return [
        mtl_tree.path_str(path)
        for path, ok in jax.tree_util.tree_leaves_with_path(flags)
        if not bool(ok)
    ]
