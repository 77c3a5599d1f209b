"""AdaSVD: task vectors weighed layer by layer by how much inputs lie in them."""

from typing import Any

import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _compose


def ada_svd(
    taus: Any,
    loads: Any,
    *,
    scale: Any = 1.0,
    others: str = "mean",
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    r"""Weighs task vectors by the mean gates of the subspaces that they act in.

      result_l = sum_t scale_t load_lt tau_lt,   load see `models.smile_loads`

    Args:
      taus: task tree, leaves [T, ...].
      loads: tree of loads [..., T], in the places of the leaves of linear layers,
        leading axes those of scanned layers; None or nothing elsewhere.
      scale: a number, or [T].
      others: what becomes of leaves without loads: "mean" of the task vectors, or
        "base", which leaves those of the base.
      weights: [T], ones by default; they multiply loads, and weigh the mean.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: loads that fit no leaf, none at all, an option that does not exist, or
        NaN or infinity.

    Follows: AdaSVD in FusionBench (Tang et al. 2024, arXiv 2406.03280): weights from
      dense SMILE layers over unlabelled inputs, biases with their kernels.

    >>> taus = {"w": jnp.array([[[1.0]], [[3.0]]]), "b": jnp.array([[1.0], [3.0]])}
    >>> ada_svd(taus, {"w": jnp.array([0.75, 0.25])})
    {'b': Array([2.], dtype=float32), 'w': Array([[1.5]], dtype=float32)}
    """
    del key
    _compose.choice("ada_svd", "others", others, ("mean", "base"))
    count, weights = _compose.check_taus("ada_svd", taus, weights, check_finite)
    _compose.check_total("ada_svd", weights)
    scale = _compose.numbers("ada_svd", "scale", scale)
    found, named = named_leaves(loads), named_leaves(taus)
    if not found:
        raise ValueError("ada_svd: there is no load in loads")
    if scale.shape not in ((), (count,)):
        raise ValueError(f"ada_svd: scale is {scale.shape}, wanted () or ({count},)")
    for name, load in found.items():
        lead = jnp.shape(load)[:-1]
        fits = name in named and jnp.shape(load)[-1:] == (count,)
        if not fits or named[name].shape[1 : 1 + len(lead)] != lead:
            wanted = named[name].shape if name in named else "no leaf"
            raise ValueError(
                f"ada_svd: the load of {name!r} is {jnp.shape(load)}, the leaf of taus "
                f"{wanted}; wanted [..., {count}]"
            )

    def leaf(name, x):
        if name not in found:
            share = weights / weights.sum() if others == "mean" else 0 * weights
            return tree.combine({name: x}, share)[name]
        wide = tree.wide_dtype(x.dtype)
        rows = jnp.asarray(found[name]).astype(wide)
        rows = jnp.moveaxis(rows * _row(scale * weights, rows), -1, 0)
        rows = rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))
        return (rows * x.astype(wide)).sum(0).astype(x.dtype)

    return tree.map_with_path(leaf, taus)


def _row(values, like):
    """[T] with axes of one in front."""
    return values.astype(like.dtype).reshape(*[1] * (like.ndim - 1), -1)
