"""SparseLo: what pruning takes away, as far as few directions hold it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.merging._lora_factors import lora_from_taus


class SparseLowRank(NamedTuple):
    """A sparse part and one of low rank, whose sum is close to what was given.

    Attributes:
      sparse: task tree, leaves [T, ...], 0 where the masks are False.
      adapters: T adapters of scale 1, see `lora_from_taus`.
    """

    sparse: Any
    adapters: list[Any]


def sparse_low_rank(
    taus: Any,
    masks: Any,
    *,
    rank: int,
    steps: int = 0,
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> SparseLowRank:
    r"""Splits matrices into entries that a mask keeps, and a matrix of low rank.

      S_0 = M tau,   L_k = the `rank` leading singular triplets of tau - S_k,
      S_(k+1) = M (tau - L_k)

    Neither step makes |tau - S - L| larger, which is what is lost.

    Args:
      taus: task tree, leaves [T, ...]: stacked parameters, or task vectors.
      masks: tree of bools like `taus`, such as those of `wanda_masks` or
        `magnitude_masks`; True = the entry stays in the sparse part.
      rank: of the other part.
      steps: how often both are found anew; 0, the mask's entries stay what they were.
      svd: how singular vectors are found, see `tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      A `SparseLowRank`, in the dtypes of `taus`. Leaves that are not matrices of two
      axes have no adapter, and stay whole in the sparse part.

    Raises:
      ValueError: masks unlike `taus`, a rank below 1, steps below 0, no matrix, or NaN
        or infinity.

    Follows: the zero-shot and the iterative SparseLo of FusionBench (Tang et al. 2024,
      arXiv 2406.03280); its other way, principal component pursuit by descent, is left
      out.

    >>> taus = {"w": jnp.array([[[5.0, 1.0], [1.0, 1.0]]])}
    >>> masks = {"w": jnp.array([[[True, False], [False, False]]])}
    >>> found = sparse_low_rank(taus, masks, rank=1, steps=40)
    >>> (found.adapters[0]["w"]["a"] @ found.adapters[0]["w"]["b"]).round(2).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    >>> found.sparse["w"].round(2).tolist()
    [[[4.0, 0.0], [0.0, 0.0]]]
    """
    name = "sparse_low_rank"
    _compose.choice(name, "svd", svd, _spectral.TOP_SVD)
    _compose.check_taus(name, taus, None, check_finite)
    flags = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), taus)
    tree.check_match(name, flags, masks, reference_name="taus", other_name="masks")
    if rank < 1 or steps < 0:
        raise ValueError(
            f"{name}: rank is {rank} and steps {steps}, wanted at least 1 and 0"
        )
    named, marks = named_leaves(taus), named_leaves(masks)
    matrices = _spectral.views(name, taus, None)
    if not matrices:
        raise ValueError(f"{name}: no leaf of taus is a matrix")
    sparse = {
        leaf: _sparse(named[leaf], marks[leaf], steps, rank, svd) for leaf in matrices
    }
    rest = {leaf: (named[leaf] - x).astype(x.dtype) for leaf, x in sparse.items()}
    adapters = lora_from_taus(
        tree.map_with_path(lambda leaf, x: rest.get(leaf, x), taus),
        rank=rank,
        matrices=lambda leaf, _: leaf in matrices,
        svd=svd,
        check_finite=check_finite,
    )
    return SparseLowRank(
        tree.map_with_path(lambda leaf, x: sparse.get(leaf, x), taus), adapters
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sparse(x, mask, steps, rank, svd):
    wide = x.astype(tree.wide_dtype(x.dtype))
    rank = min(rank, *x.shape[1:])

    def turn(_, sparse):
        u, s, vt = _spectral.svd(wide - sparse, rank, svd)
        low = _spectral.matmul(u * s[..., None, :], vt)
        return jnp.where(mask, wide - low, 0)

    first = jnp.where(mask, wide, 0)
    return jax.lax.fori_loop(0, steps, turn, first).astype(x.dtype)
