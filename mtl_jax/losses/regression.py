"""Losses of regression, one value per example."""

import chex
import jax.numpy as jnp


def squared_error(predictions: chex.Array, targets: chex.Array) -> chex.Array:
    """`(prediction - target)^2`, element by element.

    Args:
      predictions: [...] real.
      targets: [...] real.

    Returns:
      [...] float32.

    Raises:
      ValueError: if the shapes differ.
    """
    return jnp.square(_difference("squared_error", predictions, targets))


def absolute_error(predictions: chex.Array, targets: chex.Array) -> chex.Array:
    """`|prediction - target|`, element by element.

    Args:
      predictions: [...] real.
      targets: [...] real.

    Returns:
      [...] float32.

    Raises:
      ValueError: if the shapes differ.
    """
    return jnp.abs(_difference("absolute_error", predictions, targets))


def huber(
    predictions: chex.Array, targets: chex.Array, delta: float = 1.0
) -> chex.Array:
    """`d^2 / 2` for `|d| <= delta`, else `delta (|d| - delta / 2)`.

    Args:
      predictions: [...] real.
      targets: [...] real.
      delta: where the loss turns linear; positive.

    Returns:
      [...] float32.

    Raises:
      ValueError: if the shapes differ or `delta` is not positive.

    **Follows**: Huber 1964, "Robust Estimation of a Location Parameter".
    """
    if delta <= 0:
        raise ValueError(f"huber: delta must be positive, is {delta}")
    size = jnp.abs(_difference("huber", predictions, targets))
    inner = jnp.minimum(size, delta)
    return 0.5 * jnp.square(inner) + delta * (size - inner)


def _difference(name, predictions, targets):
    if predictions.shape != targets.shape:
        raise ValueError(
            f"{name}: predictions are {predictions.shape}, targets {targets.shape}"
        )
    return predictions.astype(jnp.float32) - targets.astype(jnp.float32)
