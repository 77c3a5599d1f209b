"""Polar factors: the nearest isometries of matrices."""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.merging._spectral import (
    identity,
    inverse,
    inverse_factor,
    matmul,
    svd,
    to_unit,
    transpose,
)

Polar = Literal["svd", "gram", "newton"]
POLAR = get_args(Polar)

# Smallest singular value, relative to the largest, that quick polar factors bring to 1.
# Halley's first c is then 1 / (9.7 eps): in float32, c g + 1 has a Cholesky factor also
# where rounding took eigenvalues of g below zero (`_spectral._FACTORED`).
_NEWTON_LOW, _HALLEY_LOW = 1e-4, 5e-5
_HALLEY_STEPS = 2


def polar(x: jax.Array, method: Polar = "svd") -> jax.Array:
    """The nearest partial isometry, u v^T over the singular values that are not 0.

    Args:
      x: [..., m, n].
      method: "svd" drops singular values that are rounding (`_rounding`). "gram", two
        steps of Halley's iteration by Cholesky's factors and one of Newton-Schulz, and
        "newton", matrix products alone, bring small singular values only part of the
        way: at a side of 512 those below 1e-4 of the largest ("newton" 2e-4), the
        others to 1 within about 1e-3.

    Returns:
      [..., m, n]; zeros where x is zero.
    """
    if x.shape[-2] < x.shape[-1]:
        return transpose(polar(transpose(x), method))
    if method == "svd":
        u, _, vt = svd(x)
        return matmul(u, vt)
    # Bounds of the square of the largest singular value: within a factor of 7 of it for
    # x of 1024 random columns.
    y = x * to_unit(x)
    gram = matmul(transpose(y), y)
    sums = jnp.abs(gram).sum(-1, keepdims=True).max(-2, keepdims=True)
    top = jnp.minimum(jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True), sums) ** 0.5
    y, gram = y * inverse(top), gram * inverse(top) ** 2
    if method == "newton":
        steps = jnp.asarray(_newton_steps(_NEWTON_LOW), x.dtype)
        return jax.lax.scan(lambda y, c: (_step(y, c), None), y, steps)[0]
    halley, last = _halley_steps(_HALLEY_LOW)
    for i, (a, b, c) in enumerate(halley):
        gram = matmul(transpose(y), y) if i else gram
        z = inverse_factor(c * gram + identity(gram))
        y = b / c * y + (a - b / c) * matmul(matmul(y, transpose(z)), z)
    return _step(y, last)


def _step(x, coefficients):
    """A x + b x (x^T x) + c x (x^T x)^2."""
    a, b, c = coefficients
    gram = matmul(transpose(x), x)
    square = matmul(gram, gram) if not isinstance(c, float) or c else 0.0
    return a * x + matmul(x, b * gram + c * square)


@functools.cache
def _halley_steps(low: float) -> tuple[list[tuple[float, ...]], tuple[float, ...]]:
    """Rational x (a + b x^2) / (1 + c x^2) that take [low, 1] near 1; a quintic after.

    Follows: Nakatsukasa, Bai & Gygi 2010, "Optimizing Halley's iteration", eq. 3.9.
    """
    steps = []
    for _ in range(_HALLEY_STEPS):
        square = low * low
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        low *= (a + b * square) / (1 + c * square)
        steps.append((a, b, c))
    return steps, tuple(float(c) for c in _minimax(low)[0])


@functools.cache
def _newton_steps(low: float) -> tuple[tuple[float, float, float], ...]:
    """Odd quintics that bring [low, 1] to 1: each the minimax one of what is left.

    Follows: Amsel et al. 2025, "The Polar Express", by an exchange algorithm.
    """
    steps = []
    while low < 0.9:
        step, error = _minimax(low)
        top = 1.01 * (
            1 + error
        )  # Above 1 the slope is steep: rounding must not get there.
        steps.append(tuple(float(c) / top for c in step))
        low = (1 - error) / top
    return (*steps, *[(1.875, -1.25, 0.375)] * 2)


def _minimax(low: float) -> tuple[np.ndarray, float]:
    """(a, b, c) and max |1 - a x - b x^3 - c x^5| on [low, 1], at its smallest."""
    inner = low + (1 - low) * np.array([0.25, 0.75])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(60):
        points = np.array([low, *inner, 1.0])
        system = np.stack([points, points**3, points**5, signs], 1)
        *step, error = np.linalg.solve(system, np.ones(4))
        a, b, c = step
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sort(
            np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        )
    return np.array(step), abs(float(error))
