"""DWA, weights from how fast the losses fall."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import Weighting, from_loss, masked_sum


class DwaState(NamedTuple):
    """Running averages of the losses.

    Attributes:
      total: [T] float32, sum of the losses of this window.
      count: [T] float32, how many losses were added to it.
      last: [T] float32, averages of the window before.
      older: [T] float32, averages of the window before that.
      windows: int32, complete windows.
      step: int32, steps in this window.
    """

    total: chex.Array
    count: chex.Array
    last: chex.Array
    older: chex.Array
    windows: chex.Array
    step: chex.Array


def dwa(window: int, *, temperature: float = 2.0) -> Weighting:
    r"""Weighs a task more, the slower its loss falls.

      w = T softmax(r / temperature),   r_t = last_t / older_t,

    the ratio of the mean losses of the two windows before; ones for two windows.

    Args:
      window: steps over which losses are averaged; an epoch in the paper.
      temperature: larger means more equal weights; positive.

    Returns:
      A `Weighting` with a `DwaState`; `update` counts the steps.

    Raises:
      ValueError: `window` is below 1 or `temperature` not positive.

    **Follows**: Liu et al. 2019, "End-to-End Multi-Task Learning with Attention",
      eq. 7.
    **Differs**: a task whose older mean is 0 has ratio 1; one that was absent for a
      whole window keeps its mean.

    >>> method = dwa(window=1)
    >>> params, state = method.init(2)
    >>> for losses in ([4.0, 4.0], [2.0, 4.0]):
    ...     state = method.update(state, jnp.array(losses))
    >>> [round(float(w), 3) for w in method.weights([1.0, 1.0], params, state)]
    [0.876, 1.124]
    """
    if window < 1:
        raise ValueError(f"dwa: window is {window}, wanted 1 or more steps")
    if not temperature > 0:
        raise ValueError(f"dwa: temperature is {temperature}, wanted it positive")

    def init(num_tasks):
        zeros, ones = jnp.zeros(num_tasks), jnp.ones(num_tasks)
        return {}, DwaState(zeros, zeros, ones, ones, jnp.int32(0), jnp.int32(0))

    def loss(losses, params, state, present):
        del params
        safe = jnp.where(state.older == 0, 1, state.older)
        ratio = jnp.where(state.older == 0, 1, state.last / safe)
        weights = losses.size * jax.nn.softmax(ratio / temperature)
        weights = jnp.where(state.windows < 2, 1, weights).astype(losses.dtype)
        return masked_sum(weights * losses, present)

    def update(state, losses, present, **extra):
        del extra
        total = state.total + jnp.where(present, losses, 0)
        count = state.count + present.astype(jnp.float32)
        full = state.step + 1 >= window
        average = jnp.where(count > 0, total / jnp.maximum(count, 1), state.last)
        return DwaState(
            total=jnp.where(full, 0, total),
            count=jnp.where(full, 0, count),
            last=jnp.where(full, average, state.last),
            older=jnp.where(full, state.last, state.older),
            windows=state.windows + full.astype(jnp.int32),
            step=jnp.where(full, 0, state.step + 1),
        )

    return from_loss("dwa", loss, init=init, update=update)
