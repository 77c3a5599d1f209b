"""GLS, the geometric mean of the losses."""

import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import Weighting, from_loss, masked_mean


def geometric_mean() -> Weighting:
    r"""Geometric mean of the losses, `exp(mean_t log L_t)`.

    Blind to the scale of each loss: task t weighs `mean / (T L_t)`.

    Returns:
      A `Weighting` without parameters or state. Losses must be positive.

    **Follows**: Chennupati et al. 2019, "MultiNet++: Multi-Stream Feature Aggregation
      and Geometric Loss Strategy for Multi-Task Learning".
    **Differs**: refuses a loss of 0, where the gradient is infinite; the mean is taken
      of logarithms, which neither overflows nor underflows as a product does.

    >>> method = geometric_mean()
    >>> round(float(method.loss([1.0, 4.0], *method.init(2))), 4)
    2.0
    """

    def loss(losses, params, state, present):
        del params, state
        mean = jnp.exp(masked_mean(jnp.log(losses), present))
        return jnp.where(jnp.any(present), mean, 0)

    return from_loss("geometric_mean", loss, lower=0.0)
