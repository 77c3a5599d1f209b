"""Rules that weigh models by their inner products: a Gram matrix, then one sum.

The inner products are summed over chunks, in float64 from lanes of float32; what a rule
makes of them is small and done in float64 on the host.
"""

from typing import NamedTuple

import numpy as np

from mtl_jax.checkpoints import _programs
from mtl_jax.checkpoints._whole import whole
from mtl_jax.checkpoints._work import Work, floats

# Squares of lengths below it are rounding, relative to those of what was added.
_TINY = 1e-8


class Gram(NamedTuple):
    """Inner products.

    Attributes:
      between: [N, N], of the vectors.
      inner: [N, N], of the first and the differences of the others to it.
    """

    between: np.ndarray
    inner: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N]."""
        return np.sqrt(np.maximum(np.diag(self.between), 0))

    def angle(self) -> float:
        """Between the first two; to full precision where they are nearly parallel."""
        (a, b), (_, c) = self.inner[:2, :2]
        sine = np.sqrt(max(a * c - b * b, 0))
        return float(np.arctan2(sine, self.between[0, 1]))


def gram(work: Work, *, based: bool) -> Gram:
    """Of the task vectors where there is a base, else of the models."""
    sums = work.total(lambda chunk: _programs.gram(chunk.data, based=based))
    count = len(work.job.views) - based
    inner = np.zeros((count, count))
    upper = np.triu_indices(count)
    inner[upper] = sums if np.ndim(sums) else 0.0
    inner.T[upper] = inner[upper]
    change = np.eye(count)
    change[1:, 0] = not based  # Differences to the base are the vectors themselves.
    return Gram(change @ inner @ change.T, inner)


def _combine(work: Work, weights: np.ndarray, *, based: bool) -> None:
    """sum_i w_i x_i; of task vectors, added to the base."""
    factors = floats(weights)
    if not based:
        work.emit(lambda c: _programs.combine(c.data, factors, dtype=work.dtype))
        return
    # From the differences, which are small: a factor may be large.
    pair, one = np.stack([factors, factors]), floats(1.0)
    work.emit(
        lambda c: _programs.arithmetic(
            c.data,
            pair,
            one,
            {},
            select="all",
            elect=False,
            normalize=False,
            dtype=work.dtype,
        )
    )


def _arc(found: Gram, t: float, *, linear_above: float) -> np.ndarray:
    """Factors of the point at t of the great circle through two vectors."""
    line = np.array([1 - t, t])
    lengths = found.lengths
    if not lengths.all():
        return line
    cosine = found.between[0, 1] / lengths.prod()
    angle = found.angle()
    if abs(cosine) > linear_above or angle == 0 or 1 + cosine < _TINY:
        return line
    return np.sin(line * angle) / np.sin(angle)


def linear(work: Work) -> None:
    """Weighted sum or mean."""
    weights = work.weights()
    if work.options["normalize"]:
        weights = weights / weights.sum()
    _combine(work, weights, based=False)


def slerp(work: Work) -> None:
    """From the base to the other model; linear where they are nearly parallel."""
    found = gram(work, based=False)
    factors = _arc(found, float(work.options["t"]), linear_above=0.9995)
    _combine(work, factors, based=False)


def nuslerp(work: Work) -> None:
    """Between two models or task vectors, whose weights give the place."""
    first, second = work.weights()
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if not work.options["nuslerp_flatten"]:
        axis = 0 if work.options["nuslerp_row_wise"] else -1
        whole(work, "slerp", (1 - t, t), scope="row", axis=axis, linear_above=1.0)
        return
    based = work.job.base is not None
    factors = _arc(gram(work, based=based), t, linear_above=1.0)
    _combine(work, factors, based=based)


def multislerp(work: Work) -> None:
    """The direction of the mean of directions, at the mean length."""
    weights, based = work.weights(), work.job.base is not None
    if work.options["normalize_weights"]:
        weights = weights / weights.sum()
    if work.count == 1:
        _combine(work, np.ones(1), based=based)
        return
    found, eps = gram(work, based=based), work.options["eps"]
    lengths = found.lengths
    moved = lengths > 0
    shares = np.where(moved, weights / np.where(moved, lengths + eps, 1), 0)
    square = shares @ found.between @ shares
    if square <= _TINY * np.abs(weights).sum() ** 2:
        factors = weights  # The directions cancel.
    else:
        factors = shares / np.sqrt(square) * (weights @ lengths)
    _combine(work, factors, based=based)


def karcher(work: Work) -> None:
    """The point of the sphere nearest to all directions, at the mean length."""
    found, tolerance = gram(work, based=False), float(work.options["tol"])
    lengths, count = found.lengths, work.count
    valid = lengths > tolerance
    size = lengths.mean()
    if count == 1 or not valid.any():
        factors = np.full(count, 1 / count)
    else:
        inverse = np.where(valid, 1 / np.where(valid, lengths, 1), 0)
        cosines = found.between * np.outer(inverse, inverse)
        shares = valid / valid.sum()
        point = _centre(cosines, shares, int(work.options["max_iter"]), tolerance)
        # Where directions cancel there is no centre: the mean.
        none = np.full(count, 1 / count)
        factors = none if point is None else point * inverse * size
    _combine(work, factors, based=False)


def _centre(cosines, shares, steps, tolerance):
    """Factors of the centre of unit vectors; None where their mean is zero."""

    def length(c):
        return np.sqrt(max(c @ cosines @ c, 0))

    start = length(shares)
    if start**2 < _TINY:
        return None
    point = shares / start
    for _ in range(steps):
        dots = np.clip(cosines @ point, -1, 1)
        angles = np.arccos(dots)
        used = (angles >= tolerance) & (shares > 0)
        sines = np.where(used, np.sin(angles), 1)
        pull = np.where(used, shares * angles / np.where(sines > 0, sines, 1), 0)
        tangent = pull - (pull @ dots) * point
        norm = length(tangent)
        if norm < tolerance:
            break
        point = np.cos(norm) * point + np.sin(norm) / norm * tangent
        point = point / length(point)
    return point


def model_stock(work: Work) -> None:
    """Towards the mean by the mean cosine of the task vectors."""
    options, count = work.options, work.count
    if options["filter_wise"]:
        whole(
            work,
            "model_stock",
            (1.0,) * count,
            scope="row",
            axis=-1,
            clip=bool(options["clip"]),
        )
        return
    found = gram(work, based=True)
    lengths = found.lengths
    below = np.outer(lengths, lengths)
    cosines = np.where(below > 0, found.between / np.where(below > 0, below, 1), 0)
    cosine = np.clip(cosines[np.triu_indices(count, 1)], -1, 1).mean()
    if options["clip"]:
        cosine = max(cosine, 0.0)
    divisor = 1 + (count - 1) * cosine
    ratio = count * cosine / divisor if divisor > 1e-6 else 0.0
    _combine(work, np.full(count, ratio / count), based=True)
