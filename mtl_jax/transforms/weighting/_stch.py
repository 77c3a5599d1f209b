"""STCH, a smooth maximum of the losses."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_sum,
    numbers,
    per_task,
)


class StchState(NamedTuple):
    """Running sums of the warm-up: losses [T] float32, counts [T] float32, its step."""

    total: chex.Array
    count: chex.Array
    step: chex.Array


def stch(
    *,
    mu: float = 1.0,
    weights: Sequence[float] | None = None,
    ideal: Sequence[float] | None = None,
    warmup: int | None = None,
) -> Weighting:
    r"""Smooth Tchebycheff scalarisation, `mu log sum_t exp(w_t (L_t - z_t) / mu)`.

    With `warmup`, for losses of different scales: for that many steps the loss is
    `sum_t log L_t`, and their mean losses N are kept; from then on it is
    `T mu log sum_t exp(log(L_t / N_t) / mu)`.

    Args:
      mu: smoothing; the loss tends to `max_t w_t (L_t - z_t)` as it tends to 0.
      weights: [T] preferences w; None = 1 / T each.
      ideal: [T], the best losses z; None = 0.
      warmup: steps of the logarithmic form, which takes neither `weights` nor `ideal`;
        None = the plain form.

    Returns:
      A `Weighting`, with a `StchState` where there is a warm-up; losses must then be
      positive.

    Raises:
      ValueError: `mu` is not positive, `weights` or `ideal` not one number per task or
        given beside `warmup`, or `warmup` below 1.

    **Follows**: Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective
      Optimization"; the logarithmic form is that of the authors' multi-task code.
    **Differs**: the warm-up is counted in steps and all of it is averaged; LibMTL
      averages its last epoch.

    >>> method = stch(mu=0.01)
    >>> round(float(method.loss([1.0, 4.0], *method.init(2))), 3)
    2.0
    """
    if not mu > 0:
        raise ValueError(f"stch: mu is {mu}, wanted it positive")
    if warmup is not None:
        if weights is not None or ideal is not None:
            raise ValueError("stch: warmup goes with neither weights nor ideal")
        if warmup < 1:
            raise ValueError(f"stch: warmup is {warmup}, wanted 1 or more steps")
        return _logarithmic(mu, warmup)
    w = None if weights is None else numbers("stch", "weights", weights)
    z = None if ideal is None else numbers("stch", "ideal", ideal)

    def loss(losses, params, state, present):
        del params, state
        shape = losses.shape
        if z is not None:
            losses = losses - per_task("stch", "ideal", z, shape)
        scale = 1 / losses.size if w is None else per_task("stch", "weights", w, shape)
        return mu * _log_sum_exp(scale * losses / mu, present)

    return from_loss("stch", loss)


def _log_sum_exp(x, present):
    """Over tasks that are present; 0 where none is."""
    some = jnp.any(present)
    x = jnp.where(present | ~some, x, -jnp.inf)
    return jnp.where(some, jax.nn.logsumexp(x), 0)


def _logarithmic(mu: float, warmup: int) -> Weighting:
    def init(num_tasks):
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return {}, StchState(zeros, zeros, jnp.int32(0))

    def loss(losses, params, state, present):
        del params
        logs = jnp.log(losses)
        seen = state.count > 0
        nadir = jnp.where(seen, state.total / jnp.where(seen, state.count, 1), 1)
        smooth = _log_sum_exp((logs - jnp.log(nadir)) / mu, present)
        cold = masked_sum(logs, present)
        return jnp.where(state.step < warmup, cold, losses.size * mu * smooth)

    def update(state, losses, present, **extra):
        del extra
        counts = present & (state.step < warmup)
        return StchState(
            total=state.total + jnp.where(counts, losses, 0),
            count=state.count + counts.astype(jnp.float32),
            step=state.step + 1,
        )

    return from_loss("stch", loss, init=init, update=update, lower=0.0)
