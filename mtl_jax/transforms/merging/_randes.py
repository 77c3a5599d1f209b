"""RanDeS: task vectors added under random signs, so that strangers cancel."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._rows import Axis, row_axes


def _signs(key: jax.Array, task: Any, x: jax.Array, axis: int) -> jax.Array:
    """One sign for each place along an axis of `x` [...], of one task."""
    wide = tree.wide_dtype(x.dtype)
    shape = [1] * x.ndim
    if x.ndim:
        shape[axis] = x.shape[axis]
    return jax.random.rademacher(jax.random.fold_in(key, task), shape).astype(wide)


def _leaf(x: jax.Array, weights: jax.Array, key: jax.Array, axis: int) -> jax.Array:
    wide = tree.wide_dtype(x.dtype)
    total = jnp.zeros(x.shape[1:], wide)
    for t in range(x.shape[0]):
        sign = _signs(key, t, x[t], axis)
        total += weights[t].astype(wide) * sign * x[t].astype(wide)
    return total.astype(x.dtype)


def randes(
    taus: Any,
    *,
    key: jax.Array,
    weights: Any = None,
    axis: Axis = -1,
    check_finite: bool = True,
) -> Any:
    """Superposes task vectors under random signs; `randes_restore` takes one out.

    result = sum_t w_t tau_t D_t,   D_t diagonal with independent signs +1 and -1

    The memory of all tasks is that of one. What the others leave in a restored task has
    the mean zero over keys, and no direction that the tasks share.

    Args:
      taus: task tree, leaves [T, ...].
      key: typed PRNG key, all that is needed to restore.
      weights: [T], ones by default.
      axis: along which axis of a parameter (the task axis not counted) signs differ; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `taus`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`; not a delta to be added as it is.

    Raises:
      ValueError: a key of another kind, an axis that a leaf lacks, weights that do not
        fit, or NaN or infinity.

    Follows: Zhou et al. 2025, "RanDeS: Randomized Delta Superposition for Multi-Model
      Compression", random binary diagonal matrices.
    Differs: all floating point leaves are superposed; layers are not shuffled.

    >>> taus = {"w": jnp.array([[[1.0, 2.0], [3.0, 4.0]]])}
    >>> mixed = randes(taus, key=jax.random.key(0))
    >>> randes_restore(mixed, 0, key=jax.random.key(0))["w"].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    _, weights = _compose.check_taus("randes", taus, weights, check_finite)
    _compose.check_key("randes", key)
    axes = row_axes("randes", axis, taus)
    leaves, treedef = jax.tree.flatten(taus)
    return treedef.unflatten(
        [
            _leaf(x, weights, jax.random.fold_in(key, i), a)
            if tree.is_inexact(x)
            else x[0]
            for i, (x, a) in enumerate(zip(leaves, axes, strict=True))
        ]
    )


def randes_restore(
    superposed: Any, task: Any, *, key: jax.Array, axis: Axis = -1
) -> Any:
    """One task's delta out of what `randes` returned, plus what does not cancel.

    Args:
      superposed: from `randes`, leaves [...].
      task: index of the task, counted from the front; may be traced.
      key: the key that `randes` was given.
      axis: the axis that `randes` was given.

    Returns:
      Tree like `superposed`, in its dtypes: w_t tau_t plus the other tasks under signs.

    Raises:
      ValueError: a negative task, a key of another kind, or an axis that a leaf lacks.

    Follows: Zhou et al. 2025, "RanDeS", retrieval by the inverse, which for signs is
      the same signs again.

    >>> one = {"w": jnp.array([2.0])}
    >>> abs(randes_restore(one, 0, key=jax.random.key(0))["w"][0]).item()
    2.0
    """
    _compose.check_key("randes_restore", key)
    _compose.check_index("randes_restore", "task", task)
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], superposed)
    axes = row_axes("randes_restore", axis, stacked)
    leaves, treedef = jax.tree.flatten(superposed)

    def leaf(i, x, a):
        if not tree.is_inexact(x):
            return x
        sign = _signs(jax.random.fold_in(key, i), task, x, a)
        return (sign * x.astype(sign.dtype)).astype(x.dtype)

    parts = enumerate(zip(leaves, axes, strict=True))
    return treedef.unflatten([leaf(i, x, a) for i, (x, a) in parts])
