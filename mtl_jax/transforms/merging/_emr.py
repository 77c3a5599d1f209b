"""EMR: one elected vector, and per task a mask and a rescaler to get it back."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


class Emr(NamedTuple):
    """What EMR keeps of T tasks; `emr_restore` takes one out.

    Attributes:
      unified: the elected delta, leaves [...].
      masks: tree of bools, leaves [T, ...]; `masking.pack(masks, per_task=True)` stores
        them at one bit per entry.
      rescalers: [T] float32.
    """

    unified: Any
    masks: Any
    rescalers: jax.Array


@jax.jit
def _leaf(x: jax.Array, weights: jax.Array):
    """Unified entries, masks, and per task the sums of |tau| and |mask unified|."""
    wide = tree.wide_dtype(x.dtype)
    values = [x[t].astype(wide) for t in range(x.shape[0])]
    scaled = [weights[t].astype(wide) * v for t, v in enumerate(values)]
    sign = jnp.sign(functools.reduce(jnp.add, scaled))
    masks = [v * sign > 0 for v in values]
    agree = [jnp.where(m, jnp.abs(v), 0) for m, v in zip(masks, values, strict=True)]
    top = functools.reduce(jnp.maximum, agree)
    before = jnp.stack([jnp.sum(jnp.abs(v)) for v in values])
    after = jnp.stack([jnp.sum(jnp.where(m, top, 0)) for m in masks])
    unified = (sign * top).astype(x.dtype)
    return unified, jnp.stack(masks), jnp.stack([before, after]).astype(jnp.float32)


def emr(
    taus: Any,
    *,
    weights: Any = None,
    key: Any = None,
    balance: Literal["entries", "leaves"] = "entries",
    check_finite: bool = True,
) -> Emr:
    """Elects one vector from which every task can be restored.

      s = sign(sum_t w_t tau_t),   m_t = [tau_t s > 0]
      unified = s max_t (m_t |tau_t|)
      r_t = sum |tau_t| / sum |m_t unified|

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T] of the election, positive; ones by default.
      key: unused; every merge takes one.
      balance: "entries", the two sums of a rescaler run over all entries; "leaves",
        over the means of the leaves, in which small leaves count as much as large.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      `Emr`. Its `unified` is a merge by itself, a tree with leaves [...] in the dtypes
      of `taus`; leaves that hold no deltas are the first task's, their masks False.

    Raises:
      ValueError: an option that does not exist, weights that do not fit, a complex
        leaf, or NaN or infinity.

    Follows: Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model
      Merging": elect, mask, rescale.
    Differs: the released code (and fusion_bench) sums the means of the leaves,
      `balance="leaves"`, and takes a sum of zero for negative; here such an entry is
      zero for all. The rescaler of a task of which nothing is left is 1, not 0 / 0.

    >>> taus = {"w": jnp.array([[3.0, 1.0], [1.0, -2.0]])}
    >>> merged = emr(taus)
    >>> merged.unified["w"].tolist(), merged.masks["w"].tolist()
    ([3.0, -2.0], [[True, False], [True, True]])
    """
    del key
    count, weights = _compose.check_taus("emr", taus, weights, check_finite)
    _compose.check_real("emr", taus)
    _compose.check_positive("emr", weights)
    _compose.choice("emr", "balance", balance, ("entries", "leaves"))
    leaves, treedef = jax.tree.flatten(taus)
    unified, masks, sums = [], [], jnp.zeros((2, count), jnp.float32)
    for x in leaves:
        if not tree.is_inexact(x) or not x.size:
            unified.append(x[0])
            masks.append(jnp.zeros(x.shape, bool))
            continue
        chosen, mask, found = _leaf(x, weights)
        unified.append(chosen)
        masks.append(mask)
        sums += found / x[0].size if balance == "leaves" else found
    before, after = sums
    rescalers = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
    return Emr(treedef.unflatten(unified), treedef.unflatten(masks), rescalers)


@jax.jit
def _restore_leaf(unified, masks, scale, task):
    if not tree.is_inexact(unified):
        return unified
    wide = tree.wide_dtype(unified.dtype)
    value = jnp.where(masks[task], scale.astype(wide) * unified.astype(wide), 0)
    return value.astype(unified.dtype)


def emr_restore(merged: Emr, task: Any) -> Any:
    """One task's delta out of an `Emr`, `r_t m_t unified`; added at scale 1.

    Args:
      merged: from `emr`.
      task: index of the task; may be traced.

    Returns:
      Tree like `merged.unified`.

    Raises:
      ValueError: there is no such task, where that is known.

    Follows: Huang et al. 2024, "EMR-Merging", the model of one task.

    >>> merged = emr({"w": jnp.array([[3.0, 1.0], [1.0, -2.0]])})
    >>> [round(v, 3) for v in emr_restore(merged, 1)["w"].tolist()]
    [1.8, -1.2]
    """
    task = _compose.check_task("emr_restore", task, merged.rescalers.shape[0])
    scale = merged.rescalers[task]
    return jax.tree.map(
        lambda u, m: _restore_leaf(u, m, scale, task), merged.unified, merged.masks
    )
