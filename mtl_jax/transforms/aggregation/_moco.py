"""MoCo, min-norm weights of gradients that are tracked from step to step."""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation import _tracked
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients
from mtl_jax.transforms.aggregation._cosine import dot
from mtl_jax.transforms.aggregation._extra import losses_of
from mtl_jax.transforms.aggregation._solvers import project_simplex

PROJECTIONS = ("softmax", "simplex")


class MoCoState(NamedTuple):
    """State of MoCo.

    Attributes:
      step: int32, number of updates.
      tracked: leaves [T, ...], the corrected gradients y.
      weights: [T].
    """

    step: chex.Array
    tracked: Any
    weights: chex.Array


def moco(
    num_tasks: int,
    *,
    beta: float = 0.5,
    beta_power: float = 0.5,
    gamma: float = 0.1,
    gamma_power: float = 0.5,
    rho: float = 0.0,
    normalize: bool = True,
    projection: Literal["softmax", "simplex"] = "softmax",
) -> Aggregator:
    r"""Combines tracked gradients with weights that follow their smallest combination.

    At step k, with h_t = losses[t] g_t / |g_t| (or g_t itself),

      y <- y - beta k^-beta_power (y - h)
      w <- softmax(w - gamma k^-gamma_power (y y^T + rho I) w),  d = sum_t w[t] y_t.

    Updates: leaves [T, ...] -> [...]. State: a `MoCoState`, T times the parameters in
    float32.

    Args:
      num_tasks: T.
      beta: first step size of y.
      beta_power: of its decay.
      gamma: first step size of the weights.
      gamma_power: of its decay.
      rho: strength of the pull towards equal weights.
      normalize: whether gradients are brought to the length of their losses, which are
        then needed as the extra argument `losses` [T], none of them negative:
        refused by name where values are known, NaN under a trace.
      projection: "simplex" projects onto it in place of the softmax.

    Raises:
      ValueError: unknown `projection`; at update, losses missing where needed, or
        negative.

    **Follows**: Fernando et al. 2023, "Mitigating Gradient Bias in Multi-objective
      Learning: A Provably Convergent Approach", alg. 1, with `normalize=False,
      projection="simplex"`.
    **Differs**: defaults are those of the authors' code. A zero gradient stays zero.

    >>> tx = moco(2)
    >>> grads, losses = {"w": 2.0 * jnp.eye(2)}, jnp.ones(2)
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}), losses=losses)[0]["w"].tolist()
    [0.25, 0.25]
    """
    if projection not in PROJECTIONS:
        raise ValueError(
            f"moco: projection is {projection!r}, wanted one of {PROJECTIONS}"
        )

    def init(params):
        equal = jnp.full(num_tasks, 1 / num_tasks, jnp.float32)
        tracked = _tracked.zeros(params, num_tasks)
        return MoCoState(jnp.zeros((), jnp.int32), tracked, equal)

    def update(task_grads, state, **extra):
        _tracked.check_count("moco", task_grads, num_tasks)
        scale = jnp.ones(num_tasks, jnp.float32)
        if normalize:
            norms = jnp.sqrt(_tracked.squares(task_grads))
            losses = losses_of("moco", extra, num_tasks)
            scale = jnp.where(norms == 0, 0, losses / jnp.where(norms == 0, 1, norms))
        step = (state.step + 1).astype(jnp.float32)
        rate = beta / step**beta_power

        def follow(y, g):
            return y - rate.astype(y.dtype) * (y - _tracked.per_task(scale, g) * g)

        tracked = _tracked.track(state.tracked, task_grads, follow)
        slope = dot(tree.gram(tracked), state.weights) + rho * state.weights
        moved = state.weights - gamma / step**gamma_power * slope
        to_simplex = jax.nn.softmax if projection == "softmax" else project_simplex
        weights = to_simplex(moved)
        out = _tracked.cast_like(tree.combine(tracked, weights), task_grads)
        return out, MoCoState(state.step + 1, tracked, weights)

    return from_gradients("moco", init, update, per_parameter=True)
