"""Model Breadcrumbs: drop the outliers and the negligible, keep the middle band."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._rows import Axis, PerLeaf, per_leaf, row_axes

Group = Literal["row", "leaf"]
Order = Literal["drop_first", "keep_first"]
TauTransform = Callable[[Any], Any]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _row_cutoff(x: jax.Array, count: Any, axis: int, zeros: bool) -> tree.Cutoff:
    rows = jnp.moveaxis(x, axis, -1)
    cutoff = tree.top_cutoff(rows, count, rows=True, zero_ties=zeros)
    return jax.tree.map(lambda c: jnp.moveaxis(c, -1, axis), cutoff)


def _cutoff(x: jax.Array, count: int, axis: int | None, zeros: bool) -> tree.Cutoff:
    """Of the rows along an axis; of whole tasks where there is none."""
    if axis is None:
        return tree.task_top_cutoffs(x, count, zero_ties=zeros)
    return _row_cutoff(x, count, axis, zeros)


def _band(
    fn_name: str, x, density, drop_top, axis: int | None, order: Order, zeros: bool
):
    """Selector of one leaf [T, ...]; scalars are kept as they are."""
    if x.ndim == 1 or not x.size:
        return _compose.Everything()
    length = x[0].size if axis is None else x.shape[axis]
    dropped = _compose.share(fn_name, "drop_top", drop_top, length)
    kept = _compose.share(fn_name, "density", density, length)
    last = min(kept + dropped, length) if order == "drop_first" else max(kept, dropped)
    return _compose.Band(
        low=None if last == length else _cutoff(x, last, axis, zeros),
        high=None if dropped == 0 else _cutoff(x, dropped, axis, zeros),
    )


def _selectors(
    fn_name: str, taus, density, drop_top, group, axis, order, *, zeros: bool = False
) -> list[Any]:
    if group not in ("row", "leaf"):
        raise ValueError(f"{fn_name}: group is {group!r}, wanted 'row' or 'leaf'")
    if order not in ("drop_first", "keep_first"):
        raise ValueError(
            f"{fn_name}: order is {order!r}, wanted 'drop_first' or 'keep_first'"
        )
    densities = per_leaf(fn_name, "density", density, taus)
    drops = per_leaf(fn_name, "drop_top", drop_top, taus)
    leaves = jax.tree.leaves(taus)
    axes = row_axes(fn_name, axis, taus) if group == "row" else [None] * len(leaves)
    return [
        _band(fn_name, x, b, g, a, order, zeros) if tree.is_inexact(x) else None
        for x, b, g, a in zip(leaves, densities, drops, axes, strict=True)
    ]


def breadcrumbs(
    taus: Any,
    *,
    density: PerLeaf = 0.15,
    drop_top: PerLeaf = 0.01,
    weights: Any = None,
    key: Any = None,
    group: Group = "row",
    axis: Axis = -1,
    order: Order = "drop_first",
    check_finite: bool = True,
) -> Any:
    """Adds task vectors from which outliers and small changes were removed.

    In every group of n entries, ranked by magnitude, the first g = floor(drop_top * n)
    go, the next min(floor(density * n), n - g) stay, and the rest go. The result is
    `sum_t w_t m_t tau_t`; survivors are not rescaled and no sign is elected.

    Args:
      taus: task tree, leaves [T, ...].
      density: fraction of a group that is kept, of all its entries; a number, a
        function of the leaf's path, or a tree of numbers like `taus`.
      drop_top: fraction dropped from the top; as `density`.
      weights: [T], ones by default.
      key: unused; every merge takes one.
      group: "row", every row along `axis`; "leaf", every leaf.
      axis: along which axis of a parameter (the task axis not counted) rows run; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `taus`. Not read where the group is "leaf".
      order: "drop_first" as above; "keep_first" keeps the floor(density * n) largest
        and then drops the outliers among them, ranks g to b.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`. Scalar leaves are summed whole.

    Raises:
      ValueError: an option that does not exist, a fraction outside [0, 1], or an axis
        that a leaf does not have.

    Follows: Davari and Belilovsky 2023, "Model Breadcrumbs", section 3.
    Differs: groups are rows as in the authors' code; the paper speaks of layers,
      `group="leaf"`. Their rows are the last axis of PyTorch's [out, in] weights, the
      inputs of one unit. Flax kernels are [..., in, out], and there the last axis would
      group the outputs of one input; `axis=unit_axis` gives their rows, -2 for leaves
      named kernel and -1 for the rest. The paper's beta counts what is masked from the
      bottom: density = 1 - beta - drop_top. Counts are exact where quantiles are off
      by one on ties.

    >>> taus = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> breadcrumbs(taus, density=0.5, drop_top=0.25)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    del key
    _, weights = _compose.check_taus("breadcrumbs", taus, weights, check_finite)
    selectors = _selectors("breadcrumbs", taus, density, drop_top, group, axis, order)
    return _compose.merge(taus, selectors, weights)


def band_masks(
    taus: Any,
    *,
    density: PerLeaf = 0.15,
    drop_top: PerLeaf = 0.01,
    group: Group = "row",
    axis: Axis = -1,
    order: Order = "drop_first",
    check_finite: bool = True,
) -> Any:
    """The masks of `breadcrumbs`, with its exact counts also among equal zeros.

    Args:
      taus: task tree, leaves [T, ...].
      density: as in `breadcrumbs`.
      drop_top: as in `breadcrumbs`.
      group: as in `breadcrumbs`.
      axis: as in `breadcrumbs`.
      order: as in `breadcrumbs`.
      check_finite: as in `breadcrumbs`.

    Returns:
      Tree of bools like `taus`, True = kept.

    Raises:
      ValueError: as in `breadcrumbs`.

    Follows: Davari and Belilovsky 2023, "Model Breadcrumbs", section 3.

    >>> taus = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> band_masks(taus, density=0.5, drop_top=0.25)["w"].tolist()
    [[False, True, True, False]]
    """
    _compose.check_taus("band_masks", taus, None, check_finite)
    selectors = _selectors(
        "band_masks", taus, density, drop_top, group, axis, order, zeros=True
    )

    def leaf(x, select):
        if not isinstance(select, _compose.Band):
            return jnp.ones(x.shape, bool)
        return jax.vmap(lambda s, x_t: s.mask(x_t))(select, x)

    leaves, treedef = jax.tree.flatten(taus)
    return treedef.unflatten(
        [leaf(x, s) for x, s in zip(leaves, selectors, strict=True)]
    )


def _transform(fn_name: str, density, drop_top, group, axis, check_finite: bool):
    def apply(taus):
        _, ones = _compose.check_taus(fn_name, taus, None, check_finite)
        selectors = _selectors(
            fn_name, taus, density, drop_top, group, axis, "drop_first"
        )
        return _compose.survivors(taus, selectors, ones)

    return apply


def drop_outliers(
    drop_top: PerLeaf,
    *,
    group: Group = "row",
    axis: Axis = -1,
    check_finite: bool = True,
) -> TauTransform:
    """Transform of a task tree that zeroes the largest share of every group.

    Args:
      drop_top: fraction zeroed; a number, a function of the path, or a tree.
      group: "row" or "leaf".
      axis: of the rows, as in `breadcrumbs`.
      check_finite: as in `breadcrumbs`.

    Returns:
      A pure function from task tree to task tree.

    >>> drop_outliers(0.5)({"w": jnp.array([[4.0, -3.0]])})["w"].tolist()
    [[0.0, -3.0]]
    """
    return _transform("drop_outliers", 1.0, drop_top, group, axis, check_finite)


def keep_top(
    density: PerLeaf,
    *,
    group: Group = "row",
    axis: Axis = -1,
    check_finite: bool = True,
) -> TauTransform:
    """Transform of a task tree that keeps the largest share of every group.

    Args:
      density: fraction kept; a number, a function of the path, or a tree.
      group: "row" or "leaf".
      axis: of the rows, as in `breadcrumbs`.
      check_finite: as in `breadcrumbs`.

    Returns:
      A pure function from task tree to task tree.

    >>> keep_top(0.5)({"w": jnp.array([[4.0, -3.0]])})["w"].tolist()
    [[4.0, 0.0]]
    """
    return _transform("keep_top", density, 0.0, group, axis, check_finite)


def scale(factor: Any) -> TauTransform:
    """Transform of a task tree that multiplies it by a number.

    Args:
      factor: scalar.

    Returns:
      A pure function from task tree to task tree, in the dtypes of its input.

    >>> scale(2.0)({"w": jnp.array([[1.0]])})["w"].tolist()
    [[2.0]]
    """
    return lambda taus: tree.add_scaled(
        jax.tree.map(jnp.zeros_like, taus), taus, factor
    )


def chain(*transforms: TauTransform) -> TauTransform:
    """Applies transforms of a task tree from left to right.

    `chain(drop_outliers(g), keep_top(b), scale(a))` is the cleaning of Breadcrumbs.

    Args:
      *transforms: pure functions from task tree to task tree.

    Returns:
      Their composition.

    >>> clean = chain(drop_outliers(0.25), keep_top(0.5), scale(2.0))
    >>> clean({"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])})["w"].tolist()
    [[0.0, -6.0, 4.0, 0.0]]
    """

    def apply(taus):
        for transform in transforms:
            taus = transform(taus)
        return taus

    return apply
