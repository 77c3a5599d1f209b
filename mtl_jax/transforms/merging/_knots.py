"""KnOTS: element-wise merging in a basis that all tasks share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.merging._ties import ties


def knots(
    taus: Any,
    *,
    rule: Callable[..., Any] = ties,
    rank: int | None = None,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    layout: _spectral.Layout = "in_out",
    svd: _spectral.Svd = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Aligns task matrices by one SVD, merges them there by any rule, and returns.

      [tau_1 ... tau_T] = U S [V_1 ... V_T]^T     U: outputs
      result = U rule(S V_1^T, ..., S V_T^T)      S V_t^T = U^T tau_t

    Args:
      taus: task tree, leaves [T, ...].
      rule: any merge, (taus, weights=, key=) -> delta; gets all aligned matrices
        [T, k, in], [T, B, k, in] where axes are batched, as one flat dict by leaf name,
        so that a global trim is global. Options by `functools.partial`.
      rank: at most this many directions U of each matrix, the leading ones; None for
        min(out, T in), which is lossless. For adapters of rank r it is T r.
      weights: [T], for the rule; ones by default.
      key: for the rule.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become the
        weighted mean.
      layout: of the matrices, "in_out" as Flax has kernels, "out_in" as PyTorch.
      svd: how U is found: "svd" of the matrices side by side, or "gram", eigenvectors
        of sum_t tau_t tau_t^T, as lossless, in which singular vectors below about 3e-4
        of the largest value (float32) are mixed with each other.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, a rank below 1, weights that do not
        fit or sum to zero, NaN or infinity, or what the rule raises.

    Follows: Stoica et al. 2025, "Model merging with SVD to tie the KnOTS", section 4.
    Differs: directions of singular values that are 0 are rows of zeros here, which a
      trim by density counts among the entries; the released code drops those up to
      1e-5, so give `rank` for low-rank deltas. Its scaling coefficients are `weights`.
      Biases are not appended to matrices.

    >>> import jax.numpy as jnp
    >>> from mtl_jax.transforms.merging import task_arithmetic
    >>> taus = {"w": jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])}
    >>> knots(taus, rule=task_arithmetic)["w"].round(4).tolist()
    [[4.0, 6.0]]
    """
    _compose.choice("knots", "svd", svd, _spectral.SVD)
    _compose.choice("knots", "layout", layout, _spectral.LAYOUT)
    if rank is not None and rank < 1:
        raise ValueError(f"knots: rank is {rank}, wanted at least 1")
    _, weights = _compose.check_taus("knots", taus, weights, check_finite)
    _compose.check_total("knots", weights)
    views, named = _spectral.views("knots", taus, matrices), named_leaves(taus)
    aligned = {
        name: _align(named[name], view, layout, rank, svd)
        for name, view in views.items()
    }
    merged = {}
    if aligned:
        blocks = {name: rows for name, (_, rows) in aligned.items()}
        merged = rule(blocks, weights=weights, key=key)

    def leaf(name, x):
        if name not in views:
            return tree.combine({name: x}, weights / weights.sum())[name]
        return _restore(aligned[name][0], merged[name], x, layout)

    return tree.map_with_path(leaf, taus)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _align(x, view, layout, rank, method):
    """U [B, m, k] and U^T tau_t [T, B, k, n]; without B where nothing is batched."""
    x = _spectral.to_matrices(x, view, layout)
    side = jnp.concatenate(list(x), -1)
    u, _, _ = _spectral.svd(
        side, None if rank is None else min(rank, *side.shape[-2:]), method
    )
    rows = _spectral.matmul(_spectral.transpose(u), x)
    return u, rows if view.lead else rows[:, 0]


@functools.partial(jax.jit, static_argnums=3)
def _restore(u, rows, like, layout):
    rows = rows.reshape(u.shape[0], u.shape[-1], -1)
    return _spectral.from_matrices(_spectral.matmul(u, rows), like, layout)
