"""TALL-masks: pull one task back out of a merged vector; Consensus merging."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


@jax.jit
def _mask_leaf(taus: jax.Array, merged: jax.Array, scale: jax.Array) -> jax.Array:
    if not tree.is_inexact(taus):
        return jnp.zeros(taus.shape, bool)
    wide = tree.wide_dtype(taus.dtype)
    merged = merged.astype(wide)
    masks = []
    for t in range(taus.shape[0]):
        tau = taus[t].astype(wide)
        masks.append(jnp.abs(tau) > scale[t].astype(wide) * jnp.abs(merged - tau))
    return jnp.stack(masks)


def tall_masks(
    taus: Any, merged: Any = None, *, scale: Any, check_finite: bool = True
) -> Any:
    """Marks the entries in which the merged vector speaks for a task.

    m_t = |tau_t| > scale_t |merged - tau_t|, strictly

    Args:
      taus: task tree, leaves [T, ...].
      merged: the multi-task delta, leaves [...]; the sum of `taus` by default.
      scale: the paper's lambda, scalar or [T], not negative; chosen per task on
        validation data.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree of bools like `taus`, True = the entry belongs to the task. Leaves that hold
      no deltas are False.

    Raises:
      ValueError: `merged` or `scale` does not fit `taus`, a scale is negative, or
        something is NaN or infinite.

    Follows: Wang et al. 2024, "Localizing Task Information for Improved Model Merging
      and Compression", section 4.1.

    >>> taus = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    >>> tall_masks(taus, scale=0.4)["w"].tolist()
    [[True, False], [False, True]]
    """
    _, ones = _compose.check_taus("tall_masks", taus, None, check_finite)
    merged = _merged("tall_masks", taus, merged, ones, check_finite)
    return _tall("tall_masks", taus, merged, scale)


def _tall(fn_name: str, taus: Any, merged: Any, scale: Any) -> Any:
    count = tree.num_tasks(fn_name, taus)
    scale = _compose.numbers(fn_name, "scale", scale)
    if scale.shape not in ((), (count,)):
        raise ValueError(
            f"{fn_name}: scale is {scale.shape}, wanted a scalar or ({count},)"
        )
    _compose.check_nonnegative(fn_name, "scale is", scale)
    scale = jnp.broadcast_to(scale, (count,))
    return jax.tree.map(lambda x, m: _mask_leaf(x, m, scale), taus, merged)


def _merged(
    fn_name: str, taus: Any, merged: Any, weights: jax.Array, check_finite: bool
) -> Any:
    if merged is None:
        return tree.combine(taus, weights)
    first = jax.eval_shape(lambda taus: jax.tree.map(lambda x: x[0], taus), taus)
    tree.check_match(fn_name, first, merged, reference_name="taus", other_name="merged")
    if check_finite:
        tree.check_finite(f"{fn_name}: merged", merged)
    return merged


def magnitude_masks(
    taus: Any,
    *,
    density: float,
    scope: _compose.Scope = "global",
    check_finite: bool = True,
) -> Any:
    """Marks the largest entries of each task, the baseline of `tall_masks`.

    Args:
      taus: task tree, leaves [T, ...].
      density: fraction marked, exactly floor(density * n) of each task.
      scope: "global" counts over the task's whole tree, "leaf" in each leaf.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree of bools like `taus`, True = kept; False in leaves that hold no deltas.

    Raises:
      ValueError: the density is not in [0, 1], the scope does not exist, or something
        is NaN or infinite.

    Follows: Wang et al. 2024, "Localizing Task Information", the magnitude baseline.

    >>> magnitude_masks({"w": jnp.array([[1.0, -3.0]])}, density=0.5)["w"].tolist()
    [[False, True]]
    """
    _compose.check_taus("magnitude_masks", taus, None, check_finite)
    selectors = _compose.top_share(
        "magnitude_masks", taus, density, scope, zero_ties=True
    )
    leaves, treedef = jax.tree.flatten(taus)
    return treedef.unflatten(
        [
            jnp.zeros(x.shape, bool)
            if select is None
            else jax.vmap(lambda s, x_t: s.mask(x_t))(select, x)
            for x, select in zip(leaves, selectors, strict=True)
        ]
    )


def _check_masks(fn_name: str, masks: Any) -> int:
    """Number of tasks, of masks that are masks."""
    count = tree.num_tasks(fn_name, masks)
    for path, leaf in jax.tree.leaves_with_path(masks):
        if leaf.dtype != bool:
            raise ValueError(
                f"{fn_name}: {tree.path_str(path)!r} is {leaf.dtype}, wanted bool"
            )
    return count


def mask_counts(masks: Any) -> Any:
    """How many tasks want each entry.

    Args:
      masks: tree of bools, leaves [T, ...].

    Returns:
      Tree with leaves [...], int8 (int32 from 128 tasks on).

    Raises:
      ValueError: there is no task axis, or a leaf is not bool.

    >>> mask_counts({"w": jnp.array([[True, False], [True, True]])})["w"].tolist()
    [2, 1]
    """
    count = _check_masks("mask_counts", masks)
    dtype = jnp.int8 if count < 128 else jnp.int32
    return jax.tree.map(lambda mask: _count_leaf(mask, dtype), masks)


@functools.partial(jax.jit, static_argnums=1)
def _count_leaf(mask: jax.Array, dtype: Any) -> jax.Array:
    return functools.reduce(
        jnp.add, [mask[t].astype(dtype) for t in range(mask.shape[0])]
    )


def consensus_mask(counts: Any, min_tasks: int) -> Any:
    """Marks the entries that at least `min_tasks` tasks want.

    Args:
      counts: tree of integers from `mask_counts`.
      min_tasks: 0 keeps everything, more than T nothing.

    Returns:
      Tree of bools like `counts`, True = kept.

    Raises:
      ValueError: `min_tasks` is not an integer, or negative.

    Follows: Wang et al. 2024, "Localizing Task Information", section 4.2.

    >>> consensus_mask({"w": jnp.array([2, 1, 0])}, 2)["w"].tolist()
    [True, False, False]
    """
    _compose.check_index("consensus_mask", "min_tasks", min_tasks)
    return jax.tree.map(lambda c: c.astype(jnp.int32) >= min_tasks, counts)


def consensus(
    taus: Any,
    *,
    weights: Any = None,
    key: Any = None,
    masks: Any = None,
    scale: Any = None,
    min_tasks: int = 2,
    merged: Any = None,
    check_finite: bool = True,
) -> Any:
    """Keeps of a merged vector what several tasks want.

    1[sum_t m_t >= min_tasks] * merged

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T] of the default sum, ones by default; not with `merged`.
      key: unused; every merge takes one.
      masks: tree of bools like `taus`, made for these tasks and this merged vector.
      scale: lambda, scalar or [T], to make the masks with instead of giving them.
      min_tasks: entries that fewer tasks want are dropped; 1 drops what no task wants.
      merged: the delta to filter, leaves [...]; the weighted sum by default.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree like `merged`.

    Raises:
      ValueError: not exactly one of `masks` and `scale`, `weights` beside `merged`,
        trees that do not fit, a negative `scale` or `min_tasks`, or something that is
        NaN or infinite.

    Follows: Wang et al. 2024, "Localizing Task Information", section 4.2.
    Differs: the strength alpha is not applied here; `tree.add_scaled` does.

    >>> taus = {"w": jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]])}
    >>> consensus(taus, scale=0.4)["w"].tolist()
    [2.0, 0.0, 0.0]
    """
    del key
    _, ones = _compose.check_taus("consensus", taus, weights, check_finite)
    _compose.check_index("consensus", "min_tasks", min_tasks)
    if (masks is None) == (scale is None):
        raise ValueError("consensus: give either masks or scale, and not both")
    if weights is not None and merged is not None:
        raise ValueError("consensus: weights make the merged vector; both are given")
    merged = _merged("consensus", taus, merged, ones, check_finite)
    if masks is None:
        masks = _tall("consensus", taus, merged, scale)
    elif jax.tree.map(jnp.shape, masks) != jax.tree.map(jnp.shape, taus):
        raise ValueError("consensus: the masks do not have the leaves of taus")
    return restore_delta(merged, consensus_mask(mask_counts(masks), min_tasks))


def restore_delta(merged: Any, mask: Any) -> Any:
    """One task's delta out of the merged one, `mask * merged`; added at scale 1.

    Args:
      merged: the multi-task delta, leaves [...].
      mask: tree of bools like `merged`.

    Returns:
      Tree like `merged`.

    Raises:
      ValueError: the mask does not have the leaves and shapes of `merged`.

    >>> merged, mask = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
    >>> restore_delta(merged, mask)["w"].tolist()
    [1.0, 0.0]
    """
    wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, bool), merged)
    tree.check_match(
        "restore_delta", wanted, mask, reference_name="merged", other_name="mask"
    )
    return jax.tree.map(lambda m, keep: jnp.where(keep, m, 0), merged, mask)


class MaskStatistics(NamedTuple):
    """What masks of T tasks say about how tasks share weights.

    Attributes:
      histogram: [T + 1] uint32, entries wanted by 0, 1, ..., T tasks. None wants the
        first ("catastrophic"), one task the second ("selfish").
      iou: [T, T] float32, intersection over union; 1 where both masks are empty.
      density: [T] float32, fraction of entries that each task wants.
    """

    histogram: jax.Array
    iou: jax.Array
    density: jax.Array


@jax.jit
def _statistics_leaf(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Histogram of counts and sizes of pairwise intersections, one pair at a time."""
    num = mask.shape[0]
    counts = functools.reduce(jnp.add, [mask[t].astype(jnp.int32) for t in range(num)])

    def both(pair):
        return jnp.sum(mask[pair // num] & mask[pair % num], dtype=jnp.uint32)

    histogram = jax.lax.map(
        lambda c: jnp.sum(counts == c, dtype=jnp.uint32), jnp.arange(num + 1)
    )
    return histogram, jax.lax.map(both, jnp.arange(num**2)).reshape(num, num)


def mask_statistics(masks: Any) -> MaskStatistics:
    """Counts how masks overlap, over all leaves.

    Args:
      masks: tree of bools, leaves [T, ...].

    Returns:
      `MaskStatistics`.

    Raises:
      ValueError: there is no task axis, or a leaf is not bool.

    Follows: Wang et al. 2024, "Localizing Task Information", section 5.

    >>> masks = {"w": jnp.array([[True, False], [True, True]])}
    >>> mask_statistics(masks).histogram.tolist()
    [0, 1, 1]
    """
    _check_masks("mask_statistics", masks)
    parts = [_statistics_leaf(mask) for mask in jax.tree.leaves(masks)]
    histogram, both = (functools.reduce(jnp.add, p) for p in zip(*parts, strict=True))
    sizes = jnp.diag(both)
    either = sizes[:, None] + sizes[None, :] - both
    iou = jnp.where(
        either > 0,
        both.astype(jnp.float32) / jnp.maximum(either, 1).astype(jnp.float32),
        1.0,
    )
    total = jnp.sum(histogram, dtype=jnp.uint32)
    density = sizes.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    return MaskStatistics(histogram, iou, density)


class CompressionBits(NamedTuple):
    """Bits to store T tasks: one checkpoint each, or one vector and T masks."""

    individual: int
    masked: int


def compression_bits(
    num_params: int, num_tasks: int, *, frozen: int = 0, bits: int = 32
) -> CompressionBits:
    """Storage of T fine-tunings, dense and as one merged vector with masks.

    individual = bits (T P + F),   masked = bits (2 P + F) + T P

    Args:
      num_params: P, parameters that fine-tuning moves.
      num_tasks: T.
      frozen: F, parameters that all tasks share and none moves.
      bits: of one stored number.

    Returns:
      `CompressionBits`; the two P are the base and the merged vector.

    Follows: Wang et al. 2024, "Localizing Task Information". The formula is our
      reading of the totals in the abstract.

    >>> compression_bits(100, 20)
    CompressionBits(individual=64000, masked=8400)
    """
    return CompressionBits(
        bits * (num_tasks * num_params + frozen),
        bits * (2 * num_params + frozen) + num_tasks * num_params,
    )
