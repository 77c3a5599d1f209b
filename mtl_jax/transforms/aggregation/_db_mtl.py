"""DB-MTL, gradients of the logarithms of the losses, brought to one length."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation import _tracked
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients
from mtl_jax.transforms.aggregation._extra import losses_of

_TINY = 1e-8  # added to the losses by the authors: a loss of zero is allowed


class DbMtlState(NamedTuple):
    """State of DB-MTL.

    Attributes:
      step: int32, number of updates.
      tracked: leaves [T, ...], moving averages of the gradients.
    """

    step: chex.Array
    tracked: Any


def db_mtl(num_tasks: int, *, beta: float = 0.9, beta_power: float = 0.0) -> Aggregator:
    r"""Adds moving averages of log-loss gradients, each as long as the longest.

    At step k, with b = beta k^-beta_power,

      y_t <- b y_t + (1 - b) g_t / (losses[t] + 1e-8)
      d = max_s |y_s| * sum_t y_t / |y_t|.

    Updates: leaves [T, ...] -> [...], gradients of the losses as they are. State: a
    `DbMtlState`, T times the parameters in float32. Parameters that tasks do not share
    follow the gradients of the logarithms. Needs the extra argument `losses`
    [T], none of them negative: refused by name where values are known, NaN under a
    trace.

    Args:
      num_tasks: T.
      beta: weight of the past.
      beta_power: of its decay.

    Raises:
      ValueError: at update, losses missing or negative, or another number of tasks.

    **Follows**: Lin et al. 2023, "Dual-Balancing for Multi-Task Learning", alg. 1.
    **Differs**: a zero average adds nothing.

    >>> tx = db_mtl(2)
    >>> grads, losses = {"w": jnp.array([[20.0, 0.0], [0.0, 1.0]])}, jnp.ones(2)
    >>> out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}), losses=losses)
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    2.00 2.00
    """

    def init(params):
        tracked = _tracked.zeros(params, num_tasks)
        return DbMtlState(jnp.zeros((), jnp.int32), tracked)

    def update(task_grads, state, **extra):
        _tracked.check_count("db_mtl", task_grads, num_tasks)
        losses = losses_of("db_mtl", extra, num_tasks)
        past = beta / (state.step + 1).astype(jnp.float32) ** beta_power
        scale = (1 - past) / (losses + _TINY)

        def follow(y, g):
            return past.astype(y.dtype) * y + _tracked.per_task(scale, g) * g

        tracked = _tracked.track(state.tracked, task_grads, follow)
        norms = jnp.sqrt(_tracked.squares(tracked))
        weights = jnp.where(
            norms == 0, 0, jnp.max(norms) / jnp.where(norms == 0, 1, norms)
        )
        out = _tracked.cast_like(tree.combine(tracked, weights), task_grads)
        return out, DbMtlState(state.step + 1, tracked)

    def heads(losses, weights):
        del weights
        return 1 / (losses_of("db_mtl", {"losses": losses}, num_tasks) + _TINY)

    return from_gradients("db_mtl", init, update, heads=heads, per_parameter=True)
