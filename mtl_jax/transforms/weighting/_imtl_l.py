"""IMTL-L, learned scales that make all losses count alike."""

import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_sum,
    per_task,
)


def imtl_l() -> Weighting:
    r"""Scales every loss towards one, `sum_t exp(s_t) L_t - s_t` with learned s.

    At the optimum of s every scaled loss is 1.

    Returns:
      A `Weighting` with params `{"log_scale": [T] float32}`, zeros. Losses must be
      positive: at 0 or below s has no optimum.

    **Follows**: Liu et al. 2021, "Towards Impartial Multi-task Learning".

    >>> method = imtl_l()
    >>> float(method.loss([1.0, 3.0], *method.init(2)))
    4.0
    """

    def init(num_tasks):
        return {"log_scale": jnp.zeros(num_tasks, jnp.float32)}, ()

    def loss(losses, params, state, present):
        del state
        s = per_task("imtl_l", "log_scale", params["log_scale"], losses.shape)
        return masked_sum(jnp.exp(s) * losses - s, present)

    return from_loss("imtl_l", loss, init=init, lower=0.0)
