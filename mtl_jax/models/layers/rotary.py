"""Rotary position embedding, rotating the two halves of each head."""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

SCALINGS = ("linear", "llama3")


def rotary_frequencies(
    head_dim: int, base: float, scaling: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Angles per position, `base^(-2 i / d)`, stretched for longer contexts.

    "linear" divides all by `factor`. "llama3" divides those whose wavelength exceeds
    `original / low_freq_factor`, keeps those below `original / high_freq_factor`, and
    blends in between.

    Args:
      head_dim: d, even.
      base: theta.
      scaling: {"type": "linear", "factor"} or {"type": "llama3", "factor",
        "low_freq_factor", "high_freq_factor", "original_max_positions"}; None = none.

    Returns:
      [d / 2] float32.

    Raises:
      ValueError: for an odd `head_dim`, or a scaling that is unknown or incomplete.

    **Follows**: Su et al. 2021, "RoFormer"; Chen et al. 2023, "Extending Context
    Window of Large Language Models via Positional Interpolation"; Grattafiori et al.
    2024, "The Llama 3 Herd of Models".
    """
    if head_dim % 2:
        raise ValueError(f"rotary_frequencies: head_dim must be even, is {head_dim}")
    rates = float(base) ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return rates.astype(np.float32)
    kind = scaling.get("type")
    if kind not in SCALINGS:
        known = ", ".join(map(repr, SCALINGS))
        raise ValueError(f"rotary_frequencies: no scaling {kind!r}, known: {known}")
    factor = _entry(scaling, "factor")
    if kind == "linear":
        return (rates / factor).astype(np.float32)
    low, high = (_entry(scaling, f"{side}_freq_factor") for side in ("low", "high"))
    if not low < high:
        raise ValueError(
            f"rotary_frequencies: low_freq_factor must be below high_freq_factor, "
            f"found {low} and {high}"
        )
    turns = _entry(scaling, "original_max_positions") * rates / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (keep * rates + (1 - keep) * rates / factor).astype(np.float32)


def rotary_tables(
    positions: chex.Array, frequencies: np.ndarray
) -> tuple[chex.Array, chex.Array]:
    """Cosines and sines of `position * frequency`.

    Args:
      positions: [B, L] integer.
      frequencies: [d / 2].

    Returns:
      Two arrays [B, L, d / 2] float32.
    """
    rates = jnp.asarray(frequencies, jnp.float32)[None, None]
    angles = positions.astype(jnp.float32)[..., None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
    """Turns the pair (x[i], x[i + d/2]) by its angle, in float32 inside.

    Args:
      x: [B, L, H, d].
      cos: [B, L, d / 2].
      sin: [B, L, d / 2].

    Returns:
      [B, L, H, d] in the dtype of x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _entry(scaling, key):
    if key not in scaling:
        raise ValueError(
            f"rotary_frequencies: scaling {scaling['type']!r} lacks {key!r}"
        )
    return float(scaling[key])
