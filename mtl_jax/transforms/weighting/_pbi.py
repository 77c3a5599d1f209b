"""PBI, distance along a preference plus a penalty for leaving it."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_sum,
    numbers,
    per_task,
)


def pbi(
    weights: Sequence[float],
    *,
    penalty: float = 5.0,
    ideal: Sequence[float] | None = None,
) -> Weighting:
    r"""Penalty-based boundary intersection.

      loss = d_1 + penalty d_2,   u = w / |w|,
      d_1 = <L - z, u>,   d_2 = |L - z - d_1 u|.

    Args:
      weights: [T] preferences w, not all 0.
      penalty: of the distance from the direction, 0 or more.
      ideal: [T], the best losses z; None = 0.

    Returns:
      A `Weighting` without parameters or state.

    Raises:
      ValueError: `weights` or `ideal` are not one number per task, the weights all 0,
        or `penalty` negative.

    **Follows**: Zhang and Li 2007, "MOEA/D: A Multiobjective Evolutionary Algorithm
      Based on Decomposition".
    **Differs**: the gradient of d_2 is 0 on the direction itself, where it has none;
      TorchJD adds 1e-12 under the root.

    >>> method = pbi([1.0, 0.0])
    >>> float(method.loss([2.0, 1.0], *method.init(2)))
    7.0
    """
    if not penalty >= 0:
        raise ValueError(f"pbi: penalty is {penalty}, wanted 0 or more")
    fixed = numbers("pbi", "weights", weights)
    best = None if ideal is None else numbers("pbi", "ideal", ideal)
    if not fixed.any():
        raise ValueError("pbi: weights are all 0")

    def loss(losses, params, state, present):
        del params, state
        if best is not None:
            losses = losses - per_task("pbi", "ideal", best, losses.shape)
        losses = jnp.where(present, losses, 0)
        w = jnp.where(present, per_task("pbi", "weights", fixed, losses.shape), 0)
        length = jnp.sqrt(jnp.sum(jnp.square(w)))
        unit = w / jnp.where(length > 0, length, 1)
        along = jnp.sum(losses * unit)
        square = masked_sum(jnp.square(losses - along * unit), present)
        aside = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        return along + penalty * aside

    return from_loss("pbi", loss)
