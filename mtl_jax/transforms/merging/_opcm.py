"""OPCM: tasks join one after the other, each without what is there already."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import number
from mtl_jax.transforms.merging import _compose, _spectral


def opcm(
    taus: Any,
    *,
    alpha: float = 0.5,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    svd: _spectral.Svd = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Merges tasks in order, each projected off the leading part of those before.

      D_1 = tau_1,   D_t = D_(t-1) + U Z(U^T tau_t V) V^T,   D_(t-1) = U S V^T
      result = mean_t |tau_t| D_T / |D_T|

    where Z sets to zero the diagonal and the leading r x r block, r the fewest singular
    values that sum to alpha of all. What U and V do not reach is kept whole. Norms are
    of the whole model.

    Args:
      taus: task tree, leaves [T, ...]; the order of the tasks counts.
      alpha: share of the singular values' sum in the protected block, 0 to 1.
      weights: [T], ones by default; they multiply the task vectors.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves are summed
        into D.
      svd: how singular vectors are found, "svd" or "gram".
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, an alpha outside [0, 1], weights that
        do not fit, or NaN or infinity.

    Follows: Tang et al. 2025, "Merging Models on the Fly Without Retraining", the
      released code's running average of norms and lambda over the whole model.
    Differs: lambda_t D_t of the paper is D_t here, and one scale at the end equals its
      scales in between. The released code protects one direction less than reaches
      alpha, and none at alpha = 1. Directions of singular values that are 0 are not
      projected away, where its full SVD takes arbitrary ones. Tasks are not shuffled.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])}
    >>> opcm(taus)["w"].round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    del key
    _compose.choice("opcm", "svd", svd, _spectral.SVD)
    alpha = number("opcm", "alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"opcm: alpha is {alpha}, wanted 0 <= alpha <= 1")
    count, weights = _compose.check_taus("opcm", taus, weights, check_finite)
    views = _spectral.views("opcm", taus, matrices)
    leaves, treedef = jax.tree.flatten(taus)
    names = tree.paths(taus)
    moved = [i for i, x in enumerate(leaves) if tree.is_inexact(x)]
    sums = {i: _start(leaves[i], weights[0]) for i in moved}
    for t in range(1, count):
        for i in moved:
            view = views.get(names[i])
            sums[i] = _join(leaves[i][t], sums[i], weights[t], view, alpha, svd)
    total = _norm(list(sums.values()))
    mean = sum(
        _norm([leaves[i][t] for i in moved]) * abs(weights[t]) for t in range(count)
    )
    scale = mean / count * _spectral.inverse(total)
    return treedef.unflatten(
        [
            (sums[i] * scale.astype(sums[i].dtype)).astype(x.dtype)
            if i in sums
            else x[0]
            for i, x in enumerate(leaves)
        ]
    )


@jax.jit
def _start(x, weight):
    wide = tree.wide_dtype(x.dtype)
    return x[0].astype(wide) * weight.astype(wide)


@jax.jit
def _norm(leaves):
    squares = [
        jnp.sum(jnp.abs(x.astype(tree.wide_dtype(x.dtype))) ** 2) for x in leaves
    ]
    return jnp.sqrt(sum(s.astype(jnp.float32) for s in squares))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _join(x, total, weight, view, alpha, method):
    x = x.astype(total.dtype) * weight.astype(total.dtype)
    if view is None:
        return total + x
    before, new = (
        _spectral.to_matrices(y[None], view, "out_in")[0] for y in (total, x)
    )
    u, s, vt = _spectral.svd(before, method=method)
    inside = _spectral.matmul(
        _spectral.transpose(u), _spectral.matmul(new, _spectral.transpose(vt))
    )
    # Those before which the sum has not reached alpha.
    lead = jnp.cumsum(s, -1) - s < alpha * s.sum(-1, keepdims=True)
    diagonal = jnp.eye(s.shape[-1], dtype=bool)[None]
    block = lead[..., :, None] & lead[..., None, :] | diagonal
    known = _spectral.matmul(u, _spectral.matmul(jnp.where(block, inside, 0), vt))
    return total + (new - known).reshape(x.shape)
