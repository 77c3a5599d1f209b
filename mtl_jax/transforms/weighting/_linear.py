"""Fixed weights: what every method is compared with."""

from collections.abc import Sequence

from mtl_jax.transforms.weighting._base import (
    Weighting,
    from_loss,
    masked_mean,
    masked_sum,
    numbers,
    per_task,
)


def sum() -> Weighting:
    """Adds the losses, `sum_t L_t`.

    Returns:
      A `Weighting` without parameters or state.

    >>> method = sum()
    >>> float(method.loss([1.0, 3.0], *method.init(2)))
    4.0
    """
    return from_loss("sum", lambda losses, _, __, present: masked_sum(losses, present))


def mean() -> Weighting:
    """Averages the losses of the tasks that are present, `sum_t L_t / T`.

    Returns:
      A `Weighting` without parameters or state.

    >>> method = mean()
    >>> float(method.loss([1.0, 3.0], *method.init(2)))
    2.0
    """
    return from_loss(
        "mean", lambda losses, _, __, present: masked_mean(losses, present)
    )


def constant(weights: Sequence[float]) -> Weighting:
    """Weighs the losses by hand, `sum_t w_t L_t`.

    Args:
      weights: [T], finite.

    Returns:
      A `Weighting` without parameters or state.

    Raises:
      ValueError: the weights are not one finite number per task.

    >>> method = constant([1.0, 0.5])
    >>> float(method.loss([1.0, 3.0], *method.init(2)))
    2.5
    """
    fixed = numbers("constant", "weights", weights)

    def loss(losses, params, state, present):
        del params, state
        w = per_task("constant", "weights", fixed, losses.shape)
        return masked_sum(w * losses, present)

    return from_loss("constant", loss)
