"""SLERP: between two models along the great circle."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _compose, _sphere
from mtl_jax.transforms.merging._rows import Axis


class _Arc(NamedTuple):
    """sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle)."""

    linear_above: float

    def __call__(self, x: jax.Array, weights: jax.Array, axes: Any) -> jax.Array:
        u, lengths = _sphere.units(x, axes)
        half = _sphere.geometry(u, jnp.full_like(weights, 0.5), axes)
        sine = jnp.sqrt(jnp.maximum(half.between[:1, 0], 0))  # of half the angle
        angle = 2 * jnp.arctan2(sine, half.mean)
        chord = 2 * sine * half.mean  # the sine of the angle
        cosine = (half.mean - sine) * (half.mean + sine)
        round_ = (jnp.abs(cosine) <= self.linear_above) & (chord > _sphere.TINY)
        round_ &= jnp.all(lengths > 0, 0, keepdims=True)
        arc = jnp.sin(weights * angle) / jnp.where(round_, chord, 1)
        return jnp.where(round_, arc, weights)


def slerp(
    experts: Any,
    *,
    weights: Any = None,
    key: Any = None,
    scope: _sphere.Scope = "leaf",
    axis: Axis = -1,
    linear_above: float = 0.9995,
    check_finite: bool = True,
) -> Any:
    """Interpolates two models spherically, each leaf (or row) as one vector.

      result = (sin((1 - t) a) x_0 + sin(t a) x_1) / sin(a),   t = w_1 / (w_0 + w_1)

    with a the angle between x_0 and x_1. Not a merge of task vectors but of the
    parameters: the result is parameters. Given `taus` instead, the vectors turn
    around the base and the result is a delta.

    Args:
      experts: task tree of two models, leaves [2, ...]; see `tree.stack`.
      weights: [2] with a sum other than zero; equal by default. `[1 - t, t]` is the
        interpolation at t.
      key: unused; every merge takes one.
      scope: "leaf", one angle per leaf; "row", one per row.
      axis: along which axis of a parameter (the task axis not counted) rows run; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `experts`. Not read where the scope is "leaf".
      linear_above: absolute cosine above which the interpolation is linear; 1 for
        spherical wherever the vectors are not colinear.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `experts`; of one model that model.

    Raises:
      ValueError: more than two models, an option out of range, a leaf that lacks the
        axis or is complex, weights that do not fit, or NaN or infinity.

    Follows: Shoemake 1985, "Animating rotation with quaternion curves".
    Differs: mergekit's `slerp` is the default, its `nuslerp` is `linear_above=1`: with
      rows where it is not flat, with `taus` where it has a base. Its `nuslerp_row_wise`
      runs along axis 0. Interpolation is linear also where a vector is zero, which has
      no direction, and between opposite vectors, which no great circle singles out.

    >>> experts = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}
    >>> [round(v, 3) for v in slerp(experts)["w"].tolist()]
    [1.414, 1.414]
    """
    del key
    count, weights = _compose.check_taus("slerp", experts, weights, check_finite)
    if count > 2:
        raise ValueError(f"slerp: there are {count} models, wanted 2; see multislerp")
    linear_above = _compose.number("slerp", "linear_above", linear_above)
    if not 0 <= linear_above <= 1:
        raise ValueError(
            f"slerp: linear_above is {linear_above}, wanted 0 <= linear_above <= 1"
        )
    _compose.check_total("slerp", weights)
    shares = weights / weights.sum()
    return _sphere.merge("slerp", experts, shares, _Arc(linear_above), scope, axis)
