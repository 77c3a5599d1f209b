"""What a method needs beside the gradients: losses, a cross-batch Gramian."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp


def extra_of(
    name: str, extra: Mapping[str, Any], key: str, shape: tuple[int, ...]
) -> chex.Array:
    """An extra argument of `update` as float32.

    Raises:
      ValueError: it is missing, or not of the shape; naming method and argument.
    """
    value = extra.get(key)
    if value is None:
        raise ValueError(f"{name}: needs {key}, as in update(..., {key}={key})")
    value = jnp.asarray(value)
    if value.shape != shape:
        raise ValueError(f"{name}: {key} is {value.shape}, wanted {shape}")
    return value.astype(jnp.float32)


def losses_of(
    name: str, extra: Mapping[str, Any], count: int, *, zero: bool = True
) -> chex.Array:
    """Losses [T] that must not be negative, nor zero where `zero` is False.

    Forbidden losses are refused where their values are known, and are NaN under a
    trace, so that nothing computed from them passes for a number.

    Raises:
      ValueError: they are missing, of another shape, or forbidden.
    """
    losses = extra_of(name, extra, "losses", (count,))
    forbidden = losses < 0 if zero else losses <= 0
    if not isinstance(forbidden, jax.core.Tracer) and bool(forbidden.any()):
        wanted = "0 or more" if zero else "above 0"
        raise ValueError(f"{name}: losses are {losses.tolist()}, wanted {wanted}")
    return jnp.where(forbidden, jnp.nan, losses)
