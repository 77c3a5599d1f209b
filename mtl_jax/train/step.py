"""One optimizer step: gradients, accumulation, update, average, checks."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding
from mtl_jax.train.state import TrainState, lenient_promotion, merge
from mtl_jax.train.trainable import LossFn, Trainable

Metrics = dict[str, chex.Array]
RESERVED = ("loss", "grad_norm", "finite", "step", "time")


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
      `grad_norm`, those of the loss function, and a bool `finite`.
    """
    tx = optax.with_extra_args_support(trainable.tx)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # Models place their activations by the mesh in context.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sharded_step(state, batch)

    def sharded_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, metrics, grads = _gradients(
            trainable.loss_fn, state, batch, key, mesh, accumulate
        )
        norm = _global_norm(grads)
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
        with lenient_promotion():
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, value=loss
            )
            params = optax.apply_updates(state.params, updates)
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


def objective(
    loss_fn: LossFn, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey
) -> tuple[chex.Array, Metrics]:
    """Loss and metrics in float32 as a function of the trained leaves alone."""
    out = loss_fn(merge(params, frozen), batch, key)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise ValueError(
            "train step: loss_fn wants to return (loss, dict of metrics), "
            f"found {type(out).__name__}"
        )
    loss, metrics = out
    for name, value in {"loss": loss, **metrics}.items():
        if jnp.shape(value) != ():
            raise ValueError(
                f"train step: {name!r} of loss_fn wants to be a scalar, "
                f"found shape {jnp.shape(value)}"
            )
    taken = sorted(set(metrics) & set(RESERVED))
    if taken:
        raise ValueError(
            f"train step: metric names {taken} of loss_fn are taken by the trainer"
        )
    return jnp.asarray(loss, jnp.float32), {
        name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()
    }


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

    if accumulate == 1:
        (loss, metrics), grads = value_and_grad(batch, key)
        return loss, metrics, grads

    def body(total, each):
        index, rows = each
        micro = jax.tree.map(lambda x, r: x if r is None else r, batch, rows)
        out, grads = value_and_grad(micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), out

    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, mtl_tree.wide_dtype(p.dtype)), state.params
    )
    rows = jax.tree.map(lambda x: _microbatches(x, mesh, accumulate), batch)
    total, (losses, metrics) = jax.lax.scan(body, zeros, (jnp.arange(accumulate), rows))
    grads = jax.tree.map(
        lambda t, p: (t / accumulate).astype(p.dtype), total, state.params
    )
    return jnp.mean(losses), jax.tree.map(jnp.mean, metrics), grads


def _microbatches(x: chex.Array, mesh: Mesh, accumulate: int) -> chex.Array | None:
    """[B, ...] -> [A, B/A, ...], no example leaving its device; None for scalars."""
    if not x.ndim:
        return None
    x = jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
    spec = PartitionSpec(None, sharding.DATA)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


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
