"""Multi-SLERP: several models on a sphere, by the direction of their mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _compose, _sphere
from mtl_jax.transforms.merging._rows import Axis


class _Direction(NamedTuple):
    """Factors of the normalised sum of unit vectors, times the mean length."""

    def __call__(self, x: jax.Array, weights: jax.Array, axes: Any) -> jax.Array:
        u, lengths = _sphere.units(x, axes)
        mean = _sphere.mix(weights, u)
        length = jnp.sqrt(_sphere.total(jnp.square(mean), axes))
        usable = length > _sphere.TINY * jnp.sum(jnp.abs(weights), 0, keepdims=True)
        size = jnp.sum(weights * lengths, 0, keepdims=True)
        factors = weights / jnp.where(lengths > 0, lengths, 1) * size
        return jnp.where(usable, factors / jnp.where(usable, length, 1), weights)


def multislerp(
    experts: Any,
    *,
    weights: Any = None,
    key: Any = None,
    scope: _sphere.Scope = "leaf",
    axis: Axis = -1,
    check_finite: bool = True,
) -> Any:
    """Barycentre of several models on a sphere, each leaf (or row) as one vector.

      u_t = x_t / |x_t|,   m = sum_t w_t u_t
      result = (sum_t w_t |x_t|) m / |m|

    Like `slerp` this takes parameters and returns parameters, or takes `taus` and
    returns a delta.

    Args:
      experts: task tree, leaves [T, ...]; see `tree.stack`.
      weights: [T] with a sum other than zero, divided by it; ones by default.
      key: unused; every merge takes one.
      scope: "leaf" or "row", as in `slerp`.
      axis: of the rows, as in `slerp`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `experts`; of one model that model.

    Raises:
      ValueError: an option that does not exist, a leaf that lacks the axis or is
        complex, weights that do not fit, or NaN or infinity.

    Follows: mergekit's `multislerp`.
    Differs: there the unit vectors are projected to the tangent space at m / |m|,
      summed and mapped back; that sum is m - |m| m / |m|, which is zero for all
      inputs, so the two steps are left out. Where the unit vectors cancel, mergekit
      refuses more than two models; here the result is linear, `sum_t w_t x_t`.

    >>> experts = {"w": jnp.array([[2.0, 0.0], [0.0, 4.0]])}
    >>> [round(v, 3) for v in multislerp(experts)["w"].tolist()]
    [2.121, 2.121]
    """
    del key
    _, weights = _compose.check_taus("multislerp", experts, weights, check_finite)
    _compose.check_total("multislerp", weights)
    shares = weights / weights.sum()
    return _sphere.merge("multislerp", experts, shares, _Direction(), scope, axis)
