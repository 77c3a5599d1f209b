"""COSMOS, a weighted sum that is drawn towards a preference."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_sum,
    numbers,
    per_task,
)


def cosmos(weights: Sequence[float], *, penalty: float) -> Weighting:
    r"""Weighted sum less a reward for losses parallel to the preference.

      loss = sum_t w_t L_t - penalty * cos(w, L).

    Args:
      weights: [T] preferences w, not all 0.
      penalty: of the angle, 0 or more; the paper takes 0.01 to 8.

    Returns:
      A `Weighting` without parameters or state.

    Raises:
      ValueError: `weights` are not one number per task or all 0, or `penalty` negative.

    **Follows**: Ruchte and Grabocka 2021, "Scalable Pareto Front Approximation for Deep
      Multi-Objective Learning". Giving the preference to the model as an input
      is left to the model.
    **Differs**: the cosine is 0 where all losses are 0.

    >>> method = cosmos([0.5, 0.5], penalty=1.0)
    >>> round(float(method.loss([2.0, 2.0], *method.init(2))), 4)
    1.0
    """
    if not penalty >= 0:
        raise ValueError(f"cosmos: penalty is {penalty}, wanted 0 or more")
    fixed = numbers("cosmos", "weights", weights)
    if not fixed.any():
        raise ValueError("cosmos: weights are all 0")

    def loss(losses, params, state, present):
        del params, state
        w = per_task("cosmos", "weights", fixed, losses.shape)
        w = jnp.where(present, w, 0)
        inner = masked_sum(w * losses, present)
        squares = jnp.sum(jnp.square(w)) * masked_sum(jnp.square(losses), present)
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        return inner - penalty * jnp.where(squares > 0, inner / norms, 0)

    return from_loss("cosmos", loss)
