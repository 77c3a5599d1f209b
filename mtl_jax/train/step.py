"""One optimizer step: gradients, accumulation, update, average, checks."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mtl_jax import tree as mtl_tree
from mtl_jax.train.accumulate import mean_over_microbatches
from mtl_jax.train.objective import Metrics, objective
from mtl_jax.train.per_task import PerTaskGradients
from mtl_jax.train.state import PerTaskState, TrainState, lenient_promotion
from mtl_jax.train.trainable import LossFn, Trainable


def make_step(
    trainable: Trainable,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    ema: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Builds the pure function of one step; the caller compiles it.

    The gradient is the mean over `accumulate` equal microbatches, which is the
    gradient of the whole batch when the loss is a mean over examples. A step whose
    loss or gradient is not finite changes nothing but `state.finite`.

    Args:
      trainable: what to train.
      mesh: the mesh the batch is split over.
      accumulate: number of microbatches, run one after another.
      ema: decay of the running average of the trained leaves; None keeps none.

    Returns:
      `step(state, batch) -> (state, metrics)`, metrics being float32 scalars `loss`,
      `grad_norm`, those of the loss function, and a bool `finite`; with an aggregator
      also `loss_<task>`, `weight_<task>` where the method has weights, and, where task
      gradients or their inner products are had, `min_cosine` and `conflict_rate`.
    """
    tx = optax.with_extra_args_support(trainable.tx)
    per_task = None
    if trainable.aggregator is not None:
        per_task = PerTaskGradients(trainable, mesh, accumulate)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # Models place their activations by the mesh in context.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sharded_step(state, batch)

    def sharded_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        found, opt_state = None, state.opt_state
        if per_task is None:
            loss, metrics, grads = _gradients(
                trainable.loss_fn, state, batch, key, mesh, accumulate
            )
        else:
            found, opt_state = per_task(state, batch, key), opt_state.tx
            loss, metrics, grads = found.loss, found.metrics, found.grads
        norm = _global_norm(grads)
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
        with lenient_promotion():
            updates, opt_state = tx.update(grads, opt_state, state.params, value=loss)
            params = optax.apply_updates(state.params, updates)
        if found is not None:
            assert per_task is not None
            found = per_task.after(found, state._replace(params=params), batch, key)
            finite = finite & found.finite
            opt_state = PerTaskState(aggregator=found.aggregator, tx=opt_state)
        new = state._replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=None if ema is None else _average(state.ema, params, ema),
        )
        _check_same(state, new)
        held = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return held._replace(finite=finite), {
            "loss": loss,
            "grad_norm": norm,
            "finite": finite,
            **metrics,
        }

    return step


def _gradients(
    loss_fn: LossFn,
    state: TrainState,
    batch: Any,
    key: chex.PRNGKey,
    mesh: Mesh,
    accumulate: int,
) -> tuple[chex.Array, Metrics, Any]:
    def value_and_grad(batch, key):
        def loss(params):
            return objective(loss_fn, params, state.frozen, batch, key)

        return jax.value_and_grad(loss, has_aux=True)(state.params)

    (loss, metrics), grads = mean_over_microbatches(
        value_and_grad, batch, key, mesh, accumulate
    )
    return loss, metrics, grads


def _global_norm(tree: Any) -> chex.Array:
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _average(ema: Any, params: Any, decay: float) -> Any:
    return jax.tree.map(
        lambda a, p: a + (1 - decay) * (p.astype(a.dtype) - a), ema, params
    )


def _check_same(old: TrainState, new: TrainState) -> None:
    """A step must return the state's own structure, shapes and dtypes."""
    before = jax.tree_util.tree_leaves_with_path(old)
    after = dict(
        (mtl_tree.path_str(path), x)
        for path, x in jax.tree_util.tree_leaves_with_path(new)
    )
    for path, x in before:
        name = mtl_tree.path_str(path)
        y = after.pop(name, None)
        if y is None or (y.shape, y.dtype) != (x.shape, x.dtype):
            found = "nothing" if y is None else f"{y.dtype}{list(y.shape)}"
            raise ValueError(
                f"train step: the optimizer changed {name!r}: "
                f"wanted {x.dtype}{list(x.shape)}, found {found}"
            )
    if after:
        raise ValueError(f"train step: the optimizer added leaves {sorted(after)[:8]}")
