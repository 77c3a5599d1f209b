"""FAMO, all losses fall at the same rate, at the cost of one gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.weighting._base import (
    Weighting,
    descend,
    from_loss,
    masked_sum,
    numbers,
    per_task,
)

_EPSILON = 1e-8


class FamoState(NamedTuple):
    """Task logits, [T] float32, and the state of their optimizer."""

    logits: chex.Array
    opt_state: Any


def famo(
    *,
    lower_bounds: Sequence[float] | None = None,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
) -> Weighting:
    r"""Weighs the logarithms of the losses by how much each task just gained.

      loss = sum_t (z_t / c) log D_t,  D_t = L_t - b_t + 1e-8,  z = softmax(x),
      c = sum_t z_t / D_t held constant,

    so that the update is a convex combination of the task gradients. After the step
    the logits x move along `(dz/dx)^T (log D_before - log D_after)` by Adam: a task
    that gained more than the others weighs less.

    Args:
      lower_bounds: [T], b, losses must be greater; None = 0.
      learning_rate: of the logits.
      weight_decay: of the logits, added to their gradient.

    Returns:
      A `Weighting` with a `FamoState`; `update` needs `after`, the losses of the same
      batch after the step.

    Raises:
      ValueError: the bounds are not one finite number per task; in `update`, `after` is
        missing.

    **Follows**: Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", alg. 1.
    **Differs**: weight decay 1e-3, as TorchJD and LibMTL have it; the authors' code has
      1e-5 in the method and 0.01 in its experiments. That code also clips the gradient
      to length 1, which is left to the optimizer. A task that is absent from the batch
      has gained nothing.

    >>> method = famo()
    >>> params, state = method.init(2)
    >>> state = method.update(state, jnp.array([2.0, 2.0]), after=jnp.array([1.0, 2.0]))
    >>> logits = state.method.logits
    >>> bool(logits[0] < 0 < logits[1])
    True
    """
    bounds = None
    if lower_bounds is not None:
        bounds = numbers("famo", "lower_bounds", lower_bounds)
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def shift(losses):
        if bounds is None:
            return losses + _EPSILON
        b = per_task("famo", "lower_bounds", bounds, losses.shape)
        return losses - b + _EPSILON

    def init(num_tasks):
        logits = jnp.zeros(num_tasks, jnp.float32)
        return {}, FamoState(logits, tx.init(logits))

    def loss(losses, params, state, present):
        del params
        z = per_task("famo", "logits", jax.nn.softmax(state.logits), losses.shape)
        d = shift(losses)
        c = jax.lax.stop_gradient(masked_sum(z / d, present))
        c = jnp.where(c > 0, c, 1)
        return masked_sum(z / c * jnp.log(d), present)

    def update(state, losses, present, *, after=None, **extra):
        del extra
        if after is None:
            raise ValueError(
                "famo: update needs `after`, the losses of this batch after the step"
            )
        after = per_task("famo", "after", after, losses.shape)
        floor = 0.0 if bounds is None else jnp.asarray(bounds)
        after = jnp.where(present, jnp.maximum(after, floor), losses)
        gain = jnp.log(shift(losses)) - jnp.log(shift(after))
        _, pull = jax.vjp(jax.nn.softmax, state.logits)
        (gradient,) = pull(gain.astype(jnp.float32))
        return FamoState(*descend(tx, gradient, state.opt_state, state.logits))

    lower = 0.0 if bounds is None else bounds
    return from_loss(
        "famo", loss, init=init, update=update, lower=lower, needs=("after",)
    )
