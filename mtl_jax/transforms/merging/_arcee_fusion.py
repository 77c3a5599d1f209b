"""Arcee Fusion: keep the changes that stand out, by size and by their row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._rows import Axis, row_axes


def _excess(y: jax.Array) -> jax.Array:
    """(1 + y) log(1 + y) - y for y >= -1, to full precision also near 0."""
    near = jnp.where(jnp.abs(y) < 0.1, y, 0)
    series = jnp.zeros_like(y)
    for k in range(9, 1, -1):  # y^2/2 - y^3/6 + y^4/12 - ...
        series = near * series + (-1) ** k / (k * (k - 1))
    far = jnp.where(y > -1, y, 0)
    exact = jnp.where(y > -1, (1 + far) * jnp.log1p(far) - far, 1)
    return jnp.where(jnp.abs(y) < 0.1, near * near * series, exact)


@functools.partial(jax.jit, static_argnums=2)
def _importance(
    tau: jax.Array, base: jax.Array, axis: int, epsilon: jax.Array
) -> jax.Array:
    """|tau| times the divergence of its row, float32 of the shape of `tau`."""
    tau, base = tau.astype(jnp.float32), base.astype(jnp.float32)
    if not tau.ndim:
        return jnp.zeros_like(tau)  # The softmax of one entry is 1.
    q = jax.nn.softmax(base, axis)
    mean = jnp.sum(q * tau, axis, keepdims=True)
    away = tau - mean
    # p = q exp(tau - shift); differences of p and q are formed without subtracting.
    shift = jnp.log1p(jnp.sum(q * jnp.expm1(away), axis, keepdims=True))
    y = q * jnp.expm1(away - shift) / (q + epsilon)
    divergence = jnp.sum((q + epsilon) * _excess(y), axis, keepdims=True)
    return jnp.abs(tau) * jnp.maximum(divergence, 0)


def _order(values: jax.Array, index: int) -> jax.Array:
    """The value at an index of the non-negative values in ascending order."""
    cutoff = tree.top_cutoff(values, values.size - index, zero_ties=False)
    return jax.lax.bitcast_convert_type(cutoff.bits, jnp.float32)


@jax.jit
def _fuse(x, weights, scores, cuts):
    wide = tree.wide_dtype(x.dtype)
    total = jnp.zeros(x.shape[1:], wide)
    for t, (score, cut) in enumerate(zip(scores, cuts, strict=True)):
        value = weights[t].astype(wide) * x[t].astype(wide)
        total += jnp.where(score >= cut, value, 0)
    return total.astype(x.dtype)


def arcee_fusion(
    taus: Any,
    *,
    base: Any,
    weights: Any = None,
    key: Any = None,
    axis: Axis = -1,
    spread: float = 1.5,
    epsilon: float = 1e-8,
    check_finite: bool = True,
) -> Any:
    """Keeps the changes whose importance is far above the median of their leaf.

      p, q = softmax of the rows of base + tau, and of base, each plus epsilon
      importance = |tau| sum_row p log(p / q)
      kept where importance >= median + spread * (upper - lower quartile)

    Args:
      taus: task tree, leaves [T, ...]; several tasks are fused one by one and added.
      base: the parameters that the task vectors start from, leaves [...].
      weights: [T], ones by default.
      key: unused; every merge takes one.
      axis: along which axis of a parameter (the task axis not counted) rows run; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `taus`.
      spread: distance of the threshold from the median, in interquartile ranges.
      epsilon: added to the probabilities.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`. Leaves of one entry are kept.

    Raises:
      ValueError: `base` does not fit, an axis that a leaf lacks, a negative option,
        weights that do not fit, a complex leaf, or NaN or infinity.

    Follows: mergekit's `arcee_fusion`; no paper defines it.
    Differs: quantiles are order statistics of the whole leaf, where mergekit takes them
      from a random million of its entries. The divergence is summed from terms that
      are not negative; as a difference of logarithms it is mostly rounding for
      fine-tuned models, of either sign.

    >>> taus = {"w": jnp.array([[[0.0, 2.0], [0.1, 0.0], [0.0, 0.1], [0.0, 0.0]]])}
    >>> arcee_fusion(taus, base={"w": jnp.zeros((4, 2))})["w"].tolist()[0]
    [0.0, 2.0]
    """
    del key
    count, weights = _compose.check_taus("arcee_fusion", taus, weights, check_finite)
    _compose.check_real("arcee_fusion", taus)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), taus)
    tree.check_match("arcee_fusion", first, base, reference_name="taus")
    if check_finite:
        tree.check_finite("arcee_fusion: base", base)
    spread = _compose.nonnegative("arcee_fusion", "spread", spread)
    epsilon = jnp.float32(_compose.nonnegative("arcee_fusion", "epsilon", epsilon))
    axes = row_axes("arcee_fusion", axis, taus)

    def leaf(x, b, axis):
        if not tree.is_inexact(x) or not x.size:
            return x[0]
        scores = [
            tree.settled(_importance(x[t], b, axis, epsilon)) for t in range(count)
        ]
        cuts, last = [], x[0].size - 1
        for score in scores:
            lower, median, upper = (_order(score, last * q // 4) for q in (1, 2, 3))
            cuts.append(median + spread * (upper - lower))
        return _fuse(x, weights, scores, cuts)

    leaves, treedef = jax.tree.flatten(taus)
    parts = zip(leaves, jax.tree.leaves(base), axes, strict=True)
    return treedef.unflatten([leaf(x, jnp.asarray(b), a) for x, b, a in parts])
