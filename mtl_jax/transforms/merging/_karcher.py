"""The Karcher mean: the point of a sphere nearest to all models along its surface."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _compose, _sphere
from mtl_jax.transforms.merging._rows import Axis


def _square(space: _sphere.Geometry, c: jax.Array) -> jax.Array:
    """|sum_t c_t u_t|^2, [1, ...], for coefficients [T, ...]."""
    total = jnp.sum(c, 0, keepdims=True)
    inner = jnp.sum(c[:, None] * c[None] * space.between, (0, 1))[None]
    cross = 2 * total * jnp.sum(c * space.across, 0, keepdims=True)
    return jnp.maximum(jnp.square(total * space.mean) + cross + inner, 0)


def _step(space: _sphere.Geometry, shares: jax.Array, c: jax.Array):
    """One step u <- exp_u(sum_t a_t log_u u_t), and its length."""
    each = jnp.eye(c.shape[0], dtype=c.dtype)
    each = each.reshape(*each.shape, *(1,) * (c.ndim - 1))
    gap = jnp.concatenate([_square(space, c - each[t]) for t in range(c.shape[0])])
    angle = 2 * jnp.arcsin(jnp.minimum(jnp.sqrt(gap) / 2, 1))
    sine = jnp.sin(angle)
    stretch = jnp.where(angle > 0, angle / jnp.where(sine > 0, sine, 1), 1)
    # From the opposite point every direction is as short: it pulls nowhere.
    pull = shares * jnp.where(angle < jnp.pi - 1e-3, stretch, 0)
    tangent = pull - jnp.sum(pull * (1 - gap / 2), 0, keepdims=True) * c
    length = jnp.sqrt(_square(space, tangent))
    moved = jnp.cos(length) * c + jnp.sinc(length / jnp.pi) * tangent
    norm = jnp.sqrt(_square(space, moved))
    return moved / jnp.where(norm > 0, norm, 1), length


class _Mean(NamedTuple):
    """Factors of the Karcher mean of the directions, times the mean length."""

    max_steps: int
    tolerance: float

    def __call__(self, x: jax.Array, weights: jax.Array, axes: Any) -> jax.Array:
        u, lengths = _sphere.units(x, axes)
        shares = jnp.where(lengths > 0, weights, 0)
        total = jnp.sum(shares, 0, keepdims=True)
        shares = shares / jnp.where(total > 0, total, 1)
        space = _sphere.geometry(u, shares, axes)
        usable = space.mean > _sphere.TINY

        def unfinished(carry):
            i, _, length = carry
            return (i < self.max_steps) & jnp.any(usable & (length >= self.tolerance))

        def body(carry):
            i, c, _ = carry
            return (i + 1, *_step(space, shares, c))

        start = shares / jnp.where(usable, space.mean, 1)
        begin = (jnp.int32(0), start, jnp.full_like(space.mean, jnp.inf))
        _, c, _ = jax.lax.while_loop(unfinished, body, begin)
        size = jnp.sum(weights * lengths, 0, keepdims=True)
        factors = c / jnp.where(lengths > 0, lengths, 1) * size
        return jnp.where(usable, factors, weights)


def karcher(
    experts: Any,
    *,
    weights: Any = None,
    key: Any = None,
    scope: _sphere.Scope = "leaf",
    axis: Axis = -1,
    max_steps: int = 10,
    tolerance: float = 1e-5,
    check_finite: bool = True,
) -> Any:
    """Riemannian centre of several models on a sphere, each leaf as one vector.

      u <- exp_u(sum_t w_t log_u(x_t / |x_t|))   until the step is below the tolerance
      result = (sum_t w_t |x_t|) u

    Like `slerp` this takes parameters and returns parameters, or takes `taus` and
    returns a delta.

    Args:
      experts: task tree, leaves [T, ...]; see `tree.stack`.
      weights: [T], positive, divided by their sum; ones by default.
      key: unused; every merge takes one.
      scope: "leaf" or "row", as in `slerp`.
      axis: of the rows, as in `slerp`.
      max_steps: bound of the iteration.
      tolerance: length of a step, as an angle, that ends it.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `experts`; of one model that model.

    Raises:
      ValueError: an option that does not exist or is out of range, a leaf that lacks
        the axis or is complex, weights that do not fit, or NaN or infinity.

    Follows: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; as a
      merge, mergekit's `karcher`.
    Differs: the iterate stays in the span of the models, so it moves as T coefficients
      by their inner products and the parameters are read a fixed number of times.
      mergekit drops models shorter than the tolerance, here only zero ones, which have
      no direction; it starts from the first model where the directions cancel, here
      the result is linear there, `sum_t w_t x_t`, whatever the order of models. It has
      no weights and takes leaves whole.

    >>> experts = {"w": jnp.array([[2.0, 0.0], [0.0, 4.0]])}
    >>> [round(v, 3) for v in karcher(experts)["w"].tolist()]
    [2.121, 2.121]
    """
    del key
    _, weights = _compose.check_taus("karcher", experts, weights, check_finite)
    _compose.check_positive("karcher", weights)
    _compose.check_index("karcher", "max_steps", max_steps)
    tolerance = _compose.nonnegative("karcher", "tolerance", tolerance)
    rule = _Mean(int(max_steps), tolerance)
    shares = weights / weights.sum()
    return _sphere.merge("karcher", experts, shares, rule, scope, axis)
