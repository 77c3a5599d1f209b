"""UW, weights from learned homoscedastic uncertainty."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_sum,
    numbers,
    per_task,
)


def uncertainty(
    *, start: float = 0.0, factors: Sequence[float] | None = None
) -> Weighting:
    r"""Weighs the losses by learned variances.

      loss = sum_t f_t exp(-s_t) L_t + s_t / 2,   s_t = log sigma_t^2.

    Args:
      start: where every `s_t` begins.
      factors: [T], 1/2 for a Gaussian likelihood (regression) and 1 for a softmax
        likelihood (classification); None = 1/2 for every task.

    Returns:
      A `Weighting` with params `{"log_variance": [T] float32}`.

    Raises:
      ValueError: the factors are not one finite number per task.

    **Follows**: Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh
      Losses", eq. 7 (factor 1/2) and eq. 10 (factor 1).
    **Differs**: starts at 0, as TorchJD does; LibMTL starts at -0.5.

    >>> method = uncertainty()
    >>> float(method.loss([1.0, 3.0], *method.init(2)))
    2.0
    """
    given = None if factors is None else numbers("uncertainty", "factors", factors)

    def init(num_tasks):
        return {"log_variance": jnp.full(num_tasks, start, jnp.float32)}, ()

    def loss(losses, params, state, present):
        del state
        s = per_task(
            "uncertainty", "log_variance", params["log_variance"], losses.shape
        )
        f = 0.5 if given is None else given
        if given is not None:
            f = per_task("uncertainty", "factors", given, losses.shape)
        return masked_sum(f * jnp.exp(-s) * losses + 0.5 * s, present)

    return from_loss("uncertainty", loss, init=init)
