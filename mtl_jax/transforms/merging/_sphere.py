"""Vectors as points on spheres: one sphere for every leaf, or for every row of one.

What a rule does to directions is decided by their inner products, so a rule answers
with one coefficient per task and sphere, and the leaf is combined once. Angles come
from the distances of unit vectors to their mean: fine-tunings of one model are nearly
parallel, where the arc cosine of an inner product keeps few digits.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._rows import Axis, row_axes

Scope = Literal["leaf", "row"]
TINY = 1e-6  # Below it, the direction of a sum of unit vectors is rounding.


class Geometry(NamedTuple):
    """Inner products of unit vectors u_t around their weighted mean m.

    Shapes have 1 in the place of the axes that vectors run along.

    Attributes:
      mean: [1, ...], the length of m = sum_t a_t u_t.
      across: [T, ...], <m, u_t - m>.
      between: [T, T, ...], <u_s - m, u_t - m>.
    """

    mean: jax.Array
    across: jax.Array
    between: jax.Array


def vector_axes(
    fn_name: str, scope: Scope, axis: Axis, stacked: Any
) -> list[tuple[int, ...]]:
    """Per leaf [T, ...] the axes along which its vectors run.

    Raises:
      ValueError: the scope does not exist, a leaf is complex, or lacks the axis.
    """
    _compose.choice(fn_name, "scope", scope, ("leaf", "row"))
    _compose.check_real(fn_name, stacked)
    ranks = [jnp.ndim(leaf) for leaf in jax.tree.leaves(stacked)]
    if scope == "leaf":
        return [tuple(range(1, rank)) for rank in ranks]
    axes = row_axes(fn_name, axis, stacked)
    return [(r + a,) if r > 1 else () for r, a in zip(ranks, axes, strict=True)]


def total(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums of tasks along their vectors, [T, ...] with 1 in place of `axes`.

    Written out by task: XLA's CPU backend reduces inner axes of a larger array some
    hundred times slower than whole arrays.
    """
    inner = tuple(a - 1 for a in axes)
    return jnp.stack([jnp.sum(x[t], inner, keepdims=True) for t in range(x.shape[0])])


def units(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Unit vectors and lengths, of any scale; a zero vector stays zero.

    Args:
      x: [T, ...] in the dtype of the arithmetic.
      axes: along which vectors run.

    Returns:
      [T, ...] like `x`, and the lengths with 1 in the place of `axes`.
    """
    inner = tuple(a - 1 for a in axes)
    size = jnp.abs(x)
    peak = jnp.stack([jnp.max(size[t], inner, keepdims=True) for t in range(len(x))])
    near = x / jnp.where(peak > 0, peak, 1)
    length = jnp.sqrt(total(jnp.square(near), axes))
    return near / jnp.where(length > 0, length, 1), peak * length


def products(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Inner products of tasks, [T, ...] -> [T, T, ...] with 1 in place of `axes`."""
    return jnp.stack([total(x * x[t : t + 1], axes) for t in range(x.shape[0])])


def mix(factors: jax.Array, x: jax.Array) -> jax.Array:
    """sum_t factors[t] x[t], [1, ...]; written out, so that it is read once."""
    terms = [factors[t] * x[t] for t in range(x.shape[0])]
    return functools.reduce(jnp.add, terms)[None]


def spread(weights: jax.Array, like: jax.Array) -> jax.Array:
    """[T] -> [T, 1, ...] in the dtype and rank of `like`."""
    return weights.astype(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def geometry(u: jax.Array, shares: jax.Array, axes: tuple[int, ...]) -> Geometry:
    """Measures unit vectors around their mean.

    Args:
      u: [T, ...] unit vectors.
      shares: weights of the mean, of a shape that goes with `u`.
      axes: along which vectors run.

    Returns:
      `Geometry`.
    """
    mean = mix(shares, u)
    away = u - mean
    across = total(mean * away, axes)
    length = jnp.sqrt(total(jnp.square(mean), axes))
    return Geometry(length, across, products(away, axes))


Rule = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _merge_leaf(x: jax.Array, weights: jax.Array, axes: tuple[int, ...], rule: Rule):
    wide = x.astype(tree.wide_dtype(x.dtype))
    factors = rule(wide, spread(weights, wide), axes)
    return mix(factors, wide)[0].astype(x.dtype)


def merge(
    fn_name: str,
    experts: Any,
    weights: jax.Array,
    rule: Rule,
    scope: Scope,
    axis: Axis,
) -> Any:
    """Combines tasks leaf by leaf, `sum_t c_t x_t`, with the factors of a rule.

    Args:
      fn_name: of the public function.
      experts: task tree, leaves [T, ...].
      weights: [T].
      rule: hashable, `rule(x, weights, axes) -> c`, all of the rank of `x` [T, ...].
      scope: "leaf" or "row".
      axis: of the rows.

    Returns:
      Tree with leaves [...]; of one task, and of leaves that are not floating point,
      the first task's.
    """
    axes = vector_axes(fn_name, scope, axis, experts)
    leaves, treedef = jax.tree.flatten(experts)
    return treedef.unflatten(
        [
            _merge_leaf(jnp.asarray(x), weights, a, rule)
            if tree.is_inexact(x) and x.size and len(x) > 1
            else x[0]
            for x, a in zip(leaves, axes, strict=True)
        ]
    )
