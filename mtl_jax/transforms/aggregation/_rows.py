"""Many quadratics of one matrix at once: every iteration is one matrix product."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._cosine import dot

_STEPS = 150
_SETTLED = 1e-6  # of the bounds: slopes and heights that rounding explains
_DUAL_SETTLED = 1e-5
_NOISE = 5e-8  # of the largest eigenvalue, in the dual's multipliers
_COARSEST = 3e-4  # above that rows are left to the caller
_MIX = 0.5  # share of the bounds that give way, as the preconditioner guesses
_LOW_RANK = 0.3  # of the number of tasks


class Rows(NamedTuple):
    """What the rows have come to.

    Attributes:
      heights: [N, T], above the bounds.
      settled: bool [N], whether a row has met the conditions of optimality.
    """

    heights: chex.Array
    settled: chex.Array


def solve_rows(matrix: chex.Array, ridge: chex.Array, bounds: chex.Array) -> Rows:
    r"""Minimises `1/2 v^T A v` over `v >= l` for each row l, v = l + heights.

    Args:
      matrix: A, [T, T], with ones on its diagonal.
      ridge: [T], positive; A less a diagonal of these is positive semi-definite.
      bounds: [N, T], of size about one.

    Returns:
      Heights, and which rows have settled; the others hold nothing of use. Those of
      NaN have settled, and are NaN.
    """
    # tr(A)^2 / tr(A^2), the number of eigenvalues if all were equal.
    rank = jnp.sum(jnp.diag(matrix)) ** 2 / jnp.sum(matrix * matrix)
    few = rank < _LOW_RANK * len(ridge)
    found, settled = jax.lax.cond(few, _dual, _primal, matrix, ridge, bounds)
    broken = jnp.isnan(jnp.sum(matrix) + jnp.sum(bounds))
    return Rows(jnp.where(broken, jnp.nan, found), settled | broken)


def _sum(x):
    return jnp.sum(x, 1, keepdims=True)


def _largest(x):
    return jnp.max(x, 1, keepdims=True)


def _divide(a, b):
    """Quotient, zero where b is not positive."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1), 0)


def _primal(matrix, ridge, bounds):
    """Conjugate gradients on the heights that are free, and which are is revised.

    A row revises as soon as its free slopes are below what violates the signs; its
    next step then takes heights that are no longer free back to zero.
    """
    del ridge
    offsets = dot(bounds, matrix)

    def step(carry):
        heights, slopes, free, move, square, returns, settled, count = carry
        pushed = dot(move, matrix)
        size = jnp.where(returns, 1, _divide(square, _sum(move * pushed)))
        size = jnp.where(settled, 0, size)
        heights, slopes = heights + size * move, slopes + size * pushed
        downhill = jnp.where(free, -slopes, 0)
        wrong = _largest(jnp.maximum(jnp.where(free, -heights, -slopes), 0))
        left = _largest(jnp.abs(downhill))
        settled = (wrong <= _SETTLED) & (left <= _SETTLED)
        revise = ((left <= wrong) | (left <= _SETTLED)) & ~returns
        new = _sum(downhill * downhill)
        turn = jnp.where(returns, 0, _divide(new, square))
        revised = jnp.where(free, heights > 0, slopes < 0)
        back = jnp.where(revised, 0, -heights)
        move = jnp.where(revise, back, downhill + turn * move)
        free = jnp.where(revise, revised, free)
        return heights, slopes, free, move, new, revise, settled, count + 1

    free = offsets < 0
    move = jnp.where(free, -offsets, 0)
    none = jnp.zeros((len(bounds), 1), bool)
    zeros = jnp.zeros_like(offsets)
    start = zeros, offsets, free, move, _sum(move * move), none, none, 0
    found = jax.lax.while_loop(_going, step, start)
    return jnp.maximum(found[0], 0), found[6][:, 0]


def _dual(matrix, ridge, bounds):
    r"""Conjugate gradients on the multipliers, for Gramians of low rank.

    With A = J J^T + E, E the ridge, v = max(l, u / E) solves the problem where u = J y
    and y minimises the convex and piecewise quadratic

      1/2 |y|^2 + sum_t phi_t(J y),   phi_t' = max(l[t], u[t] / E[t]),

    of Hessian `I + J^T E^-1 J` summed over the entries above their bounds. With a
    share c of them, whichever they are, it would be P = I + c J^T E^-1 J, which
    preconditions. In y = P^-1 J^T a all is said by S = J P^-1 J^T alone.
    """
    gram = matrix - jnp.diag(ridge)
    factor = jnp.linalg.cholesky(jnp.diag(ridge) + _MIX * gram)
    smooth = ridge[:, None] * jax.scipy.linalg.cho_solve((factor, True), gram)
    smooth = (smooth + smooth.T) / 2
    inverse = (1 / ridge)[None, :]
    square = dot(matrix, matrix)
    width = jnp.sqrt(jnp.sum(square * square) / jnp.sum(matrix * matrix))
    noise = jnp.clip(_NOISE * width * jnp.max(inverse), _DUAL_SETTLED, _COARSEST)

    def step(carry):
        a, u, move, pushed, before, length, settled, count = carry
        x = inverse * u
        slope = a + jnp.maximum(bounds, x) - _MIX * x
        settled = _largest(jnp.abs(slope)) <= noise
        image = dot(slope, smooth)
        new = _sum(slope * image)
        turn = jnp.maximum(_divide(new - _sum(before * image), length), 0)
        turn = jnp.where(turn * _sum(slope * pushed) < new, turn, 0)
        move, pushed = turn * move - slope, turn * pushed - image
        above = jnp.where(x > bounds, 1 - _MIX, -_MIX) * inverse
        curvature = _sum(pushed * (move + above * pushed))
        size = jnp.where(settled, 0, _divide(-_sum(slope * pushed), curvature))
        a, u = a + size * move, u + size * pushed
        return a, u, move, pushed, slope, new, settled, count + 1

    heights = jnp.maximum(-dot(bounds, gram), 0)
    fit = _divide(_sum(heights * heights), _sum(heights * dot(heights, matrix)))
    near = -(bounds + fit * heights)
    a = near + _MIX * inverse * dot(near, gram)
    zeros, zero = jnp.zeros_like(a), jnp.zeros((len(a), 1), a.dtype)
    none = jnp.zeros((len(a), 1), bool)
    start = a, dot(a, smooth), zeros, zeros, zeros, zero, none, 0
    found = jax.lax.while_loop(_going, step, start)
    return jnp.maximum(inverse * found[1] - bounds, 0), found[6][:, 0]


def _going(carry):
    # NaN does not settle, but a matrix of it ends here.
    return jnp.any(~carry[6]) & ~jnp.isnan(carry[0][0, 0]) & (carry[7] < _STEPS)
