"""A chain of spherical interpolations of task vectors, each vector the whole model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose

_FLAT = 5e-7  # 1 - cos of an angle of a thousandth.


def slerp_chain_weights(
    gram: Any,
    weights: Any = None,
    *,
    scale: Any = 1.0,
    order: Sequence[int] | None = None,
) -> jax.Array:
    r"""Coefficients of the task vectors in a chain of spherical interpolations.

      V_(1..k) = S(V_(1..k-1), V_k; mean(a_1 .. a_(k-1)), a_k)
      S(u, v; a, b) = (sin((1 - s) angle) u + sin(s angle) v) / sin(angle)
      s = b / (a + b),   angle = arccos(<u, v> / (|u| |v|))
      scale V_(1..T) = sum_t kappa_t V_t

    Every V_(1..k) is a combination of task vectors, so that angles and coefficients
    follow from inner products alone: nothing of the size of the model is touched, and
    the gradient of a loss along weights and scale is that along T numbers.

    Args:
      gram: [T, T], inner products of whole task vectors; see `tree.gram`.
      weights: [T] positive, a; only their ratios matter. Ones by default.
      scale: scalar, the length of the result against that of the chain.
      order: in which the chain takes the tasks, a permutation of 0 to T - 1; theirs by
        default. With equal weights the task that comes last has half of its angle.

    Returns:
      kappa [T] float32; none is negative while all angles are below pi and the scale
      is positive. Differentiable in gram, weights and scale.

    Raises:
      ValueError: a Gramian that is not square, weights that do not fit or are not
        positive, or an order that is no permutation.

    Follows: "Improving General Text Embedding Model: Tackling Task Conflict and Data
      Imbalance through Model Merging" (2024), as quoted in reading notes; the paper
      itself was not read.
    Differs: interpolation is linear for angles below a thousandth, next to pi, where no
      great circle is singled out, and where a vector is zero.

    >>> [round(x, 4) for x in slerp_chain_weights(jnp.eye(2)).tolist()]
    [0.7071, 0.7071]
    """
    name = "slerp_chain_weights"
    gram = jnp.asarray(gram).astype(jnp.float32)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise ValueError(f"{name}: gram is {gram.shape}, wanted [T, T]")
    count = gram.shape[0]
    if weights is None:
        weights = jnp.ones(count, jnp.float32)
    weights = _compose.numbers(name, "weights", weights)
    if weights.shape != (count,):
        raise ValueError(f"{name}: weights are {weights.shape}, wanted ({count},)")
    _compose.check_positive(name, weights)
    places = jnp.asarray(permutation(name, order, count))
    return jnp.asarray(scale, jnp.float32) * _chain(gram, weights, places)


@jax.jit
def _chain(gram, weights, order):
    count = gram.shape[0]

    def link(carry, item):
        kappa, mean = carry
        task, before = item
        unit = (jnp.arange(count) == task).astype(jnp.float32)
        onto = jnp.matmul(gram, kappa, precision="highest")
        own = jnp.dot(kappa, onto, precision="highest")
        share = weights[task] / (mean + weights[task])
        left, right = _arc(share, own, onto[task], gram[task, task])
        mean = (mean * before + weights[task]) / (before + 1)
        return (left * kappa + right * unit, mean), None

    first = (jnp.arange(count) == order[0]).astype(jnp.float32)
    steps = (order[1:], jnp.arange(1, count, dtype=jnp.float32))
    (kappa, _), _ = jax.lax.scan(link, (first, weights[order[0]]), steps)
    return kappa


def permutation(fn_name: str, order: Sequence[int] | None, count: int) -> np.ndarray:
    """Indices of all tasks in the order given; refused where one is missing."""
    if order is None:
        return np.arange(count, dtype=np.int32)
    if sorted(order) != list(range(count)):
        raise ValueError(
            f"{fn_name}: order is {tuple(order)}, wanted a permutation of the tasks 0 "
            f"to {count - 1}"
        )
    return np.asarray(order, np.int32)


def _arc(share, own, across, other):
    """Factors of u and v from |u|^2, <u, v> and |v|^2; gradients finite everywhere."""
    there = (own > 0) & (other > 0)
    lengths = jnp.sqrt(jnp.where(there, own, 1)) * jnp.sqrt(jnp.where(there, other, 1))
    cosine = jnp.where(there, across, 0) / lengths
    round_ = there & (1 - jnp.abs(cosine) > _FLAT)
    cosine = jnp.where(round_, cosine, 0)
    angle = jnp.arccos(cosine)
    sine = jnp.sqrt((1 - cosine) * (1 + cosine))
    left, right = (jnp.sin(part * angle) / sine for part in (1 - share, share))
    return jnp.where(round_, left, 1 - share), jnp.where(round_, right, share)


def slerp_chain(
    taus: Any,
    *,
    weights: Any = None,
    key: Any = None,
    scale: Any = 1.0,
    order: Sequence[int] | None = None,
    check_finite: bool = True,
) -> Any:
    """Interpolates task vectors one after another along great circles.

    Unlike `slerp`, whose vectors are leaves or rows, a task vector is one vector here:
    one angle for the whole model. The coefficients are `slerp_chain_weights`.

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T] positive; ones by default.
      key: unused; every merge takes one.
      scale: length of the result against that of the chain.
      order: of the tasks in the chain; it matters from three tasks on.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: as `slerp_chain_weights`, nothing to merge, a complex leaf, or NaN or
        infinity.

    Follows: as `slerp_chain_weights`.
    Differs: mergekit's `slerp` takes an angle per tensor, of two models.

    >>> taus = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}
    >>> [round(v, 3) for v in slerp_chain(taus)["w"].tolist()]
    [1.414, 1.414]
    """
    del key
    _, weights = _compose.check_taus("slerp_chain", taus, weights, check_finite)
    kappa = slerp_chain_weights(tree.gram(taus), weights, scale=scale, order=order)
    return tree.combine(taus, kappa)
