"""FairGrad, the alpha-fair allocation, and the solver it shares with Nash-MTL."""

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)
from mtl_jax.transforms.aggregation._cosine import Cosines, cosine_gram, dot

_STEPS = 40
_TOLERANCE = 1e-4  # Newton squares the error once more after it has become that small.
_COARSEST = 0.1
_TRIED = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0.02, 0.005)


def fair_shares(
    split: Cosines, power: float, start: chex.Array | None = None
) -> chex.Array:
    r"""The positive solution of `gram @ w = w^-power`, free of lengths.

    It minimises the strictly convex `w^T G w / 2 - sum_t integral of w[t]^-power`. With
    b = norms^((power - 1) / (power + 1)) the equations read

      U (b x) = b x^-power,  U the cosines,

    which has x = 1 where all gradients are orthogonal, whatever their lengths. Newton's
    method with a line search, in the variables b x; before each step the common factor
    is the best there is, in closed form, since near a stationary point shares are large
    and steps alone would double them at most.

    Args:
      split: cosines and norms.
      power: above zero.
      start: [T], positive, or None.

    Returns:
      [T], `x = w norms^(2 / (1 + power))`; large but finite where
      some convex combination of the gradients vanishes.
    """
    cosines, norms, inverse = split
    count = len(norms)
    active = inverse != 0
    eps = float(jnp.finfo(norms.dtype).eps)
    ridge = 1e-6 + count * eps
    extra = jnp.where(active, ridge, 1).astype(norms.dtype)
    matrix = cosines + jnp.diag(extra)
    largest = jnp.max(norms)
    relative = jnp.where(active, norms / jnp.where(largest == 0, 1, largest), 1)
    scale = relative ** ((power - 1) / (power + 1))

    def inverse_power(x):
        # Kept below infinity: a share near zero has steps ahead of it.
        return jnp.exp(jnp.minimum(-power * jnp.log(x), 50))

    def step(carry):
        x, _, taken = carry
        point = scale * x
        product, barrier = dot(matrix, point), inverse_power(x)
        # Rounding may take the curvature below what the ridge alone makes of it.
        curvature = jnp.maximum(dot(point, product), ridge * dot(point, point))
        common = (dot(scale * barrier, point) / curvature) ** (1 / (1 + power))
        x, product, barrier = x * common, product * common, inverse_power(x * common)
        point = scale * x
        residual = product - scale * barrier
        hessian = matrix + jnp.diag(power * barrier / x)
        factor = jnp.linalg.cholesky(hessian)
        move = -jax.scipy.linalg.cho_solve((factor, True), residual)
        change = move / scale
        reach = jnp.minimum(1, 0.99 / jnp.maximum(jnp.max(-change / x), 1e-30))
        sizes = reach * jnp.asarray(_TRIED, x.dtype)
        tried = x[None] + sizes[:, None] * change[None]
        # Slope of the convex objective along the move: the first size that does not
        # overshoot by much is the best one tried.
        growth = dot(move, dot(matrix, move))
        slopes = (
            dot(move, product)
            + sizes * growth
            - dot(inverse_power(tried), scale * move)
        )
        good = jnp.asarray(slopes <= 0.2 * jnp.abs(dot(move, residual)))
        size = sizes[jnp.argmax(good.at[-1].set(True))]
        # Where the product cancels, its rounding is what keeps the steps from ending.
        noise = eps * jnp.max(dot(jnp.abs(matrix), point) / (scale * barrier))
        enough = jnp.clip(noise, _TOLERANCE, _COARSEST)
        excess = jnp.max(jnp.abs(size * change) / x) / enough
        return jnp.maximum(x + size * change, 1e-12), excess, taken + 1

    def unfinished(carry):
        _, excess, taken = carry
        return (excess > 1) & (taken < _STEPS)

    x = jnp.ones_like(norms) if start is None else start.astype(norms.dtype)
    carry = (x, jnp.full((), jnp.inf, norms.dtype), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, step, carry)[0]


def weights(gram: chex.Array, alpha: float = 1.0) -> chex.Array:
    r"""Weights of the alpha-fair update, `gram @ w = w^(-1 / alpha)` with w > 0.

    Args:
      gram: [T, T], inner products of task gradients.
      alpha: fairness; 0 is the mean, 1 proportional fairness (Nash-MTL), and towards
        infinity the least improved task decides.

    Returns:
      [T] float32, positive; zero for zero gradients. The update's length goes with that
      of the gradients to the power `(alpha - 1) / (alpha + 1)`, not linearly.

    Raises:
      ValueError: `gram` is not square, or a negative `alpha`.

    **Follows**: Ban and Ji 2024, "Fair Resource Allocation in Multi-Task Learning",
      eq. 4 and alg. 1.
    **Differs**: the equations are solved to rounding by Newton's method on the convex
      problem behind them, in place of non-linear least squares. For dependent gradients
      the cosines have a ridge of 1e-6, so weights stay finite at stationary points.

    >>> found = weights(jnp.diag(jnp.array([4.0, 1.0])))
    >>> print(*(f"{x:.2f}" for x in found))
    0.50 1.00
    """
    _check(alpha)
    if alpha == 0:
        gram = gram_of("fair_grad", gram)
        return jnp.full(len(gram), 1 / len(gram), gram.dtype)
    power = 1 / alpha
    split = cosine_gram("fair_grad", gram)
    return fair_shares(split, power) * split.inverse ** (2 / (1 + power))


def fair_grad(*, alpha: float = 1.0) -> Aggregator:
    """Aggregates by FairGrad; see `weights.fair_grad`.

    Updates: leaves [T, ...] -> [...].

    Args:
      alpha: fairness, 0 or more.

    >>> tx = fair_grad()
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    1.00 1.00
    """
    _check(alpha)
    return from_gramian("fair_grad", stateless(lambda gram: weights(gram, alpha)))


def _check(alpha: float) -> None:
    if not alpha >= 0:
        raise ValueError(f"fair_grad: alpha is {alpha}, wanted 0 or more")
