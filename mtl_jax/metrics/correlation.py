"""Agreement of two orders, on the host."""

from typing import Any

import numpy as np


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation: that of Pearson between ranks, equal ranks shared.

    Args:
      x: [N] real.
      y: [N] real.

    Returns:
      A float from -1 to 1; NaN where one side is constant.

    Raises:
      ValueError: the shapes differ, fewer than two values, or NaN.

    >>> round(spearman([1.0, 2.0, 3.0], [0.1, 0.2, 9.0]), 6)
    1.0
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"spearman: wanted [N] twice, found {x.shape} and {y.shape}")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("spearman: found NaN")
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    """Positions in order; equal values get the mean of theirs."""
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[where]
