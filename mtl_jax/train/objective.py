"""What a loss function returned, checked and in float32."""

from typing import Any

import chex
import jax.numpy as jnp

from mtl_jax.train.state import merge
from mtl_jax.train.trainable import LossFn

Metrics = dict[str, chex.Array]
RESERVED = ("loss", "grad_norm", "finite", "step", "time")


def objective(
    loss_fn: LossFn, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey
) -> tuple[chex.Array, Metrics]:
    """Loss and metrics in float32 as a function of the trained leaves alone."""
    out = loss_fn(merge(params, frozen), batch, key)
    loss, metrics = _pair(out, "loss")
    if jnp.shape(loss) != ():
        raise ValueError(
            "train step: 'loss' of loss_fn wants to be a scalar, "
            f"found shape {jnp.shape(loss)}"
        )
    return jnp.asarray(loss, jnp.float32), check_metrics(metrics)


def task_objective(
    loss_fn: LossFn, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey
) -> tuple[chex.Array, Metrics]:
    """Task losses [T] and metrics in float32, as a function of the trained leaves."""
    out = loss_fn(merge(params, frozen), batch, key)
    return check_tasks(*_pair(out, "losses [T]"))


def check_tasks(losses: Any, metrics: Any) -> tuple[chex.Array, Metrics]:
    """The two in float32.

    Raises:
      ValueError: losses that are not [T], or metrics that are not scalars.
    """
    shape = getattr(losses, "shape", ())
    if len(shape) != 1 or not shape[0]:
        found = f"shape {shape}" if hasattr(losses, "shape") else type(losses).__name__
        raise ValueError(
            "train step: with an aggregator, the losses of loss_fn want to be [T], one "
            f"per task, found {found}"
        )
    return jnp.asarray(losses, jnp.float32), check_metrics(metrics)


def check_metrics(metrics: Metrics, taken: tuple[str, ...] = RESERVED) -> Metrics:
    """Metrics in float32.

    Raises:
      ValueError: one that is not a scalar, or whose name is taken.
    """
    for name, value in metrics.items():
        if jnp.shape(value) != ():
            raise ValueError(
                f"train step: {name!r} of loss_fn wants to be a scalar, "
                f"found shape {jnp.shape(value)}"
            )
    both = sorted(set(metrics) & set(taken))
    if both:
        raise ValueError(
            f"train step: metric names {both} of loss_fn are taken by the trainer"
        )
    return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def _pair(out: Any, first: str) -> tuple[Any, Metrics]:
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise ValueError(
            f"train step: loss_fn wants to return ({first}, dict of metrics), "
            f"found {type(out).__name__}"
        )
    return out
