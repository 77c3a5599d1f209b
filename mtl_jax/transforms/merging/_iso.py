"""Isotropic merging: every direction of the merged matrix gets the same strength."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax._checks import share
from mtl_jax._lapack import stacked
from mtl_jax.transforms.merging import _compose, _polar, _spectral
from mtl_jax.transforms.merging._spectral import matmul, transpose


def iso_c(
    taus: Any,
    *,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    polar: _polar.Polar = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Sums task matrices and makes all singular values their mean.

      sum_t w_t tau_t = U S V^T,    result = mean(S) U V^T

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T], ones by default; they multiply the task vectors.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become the
        weighted mean.
      polar: how U V^T is found, "svd", "gram" or "newton", matrix products alone. The
        mean comes from it, sum(S) = <U V^T, sum_t w_t tau_t>. The last two bring small
        singular values only part of the way: of 8 synthetic tasks of 1024 x 1024 with
        values i^-0.7 (i^-1.5), 0.1 (6) percent of the norm were off with "gram", 0.3
        (8) with "newton".
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, weights that do not fit or sum to
        zero, or NaN or infinity.

    Follows: Marczak et al. 2025, "No Task Left Behind", section 4.1, Iso-C.
    Differs: directions in which the sum is zero stay zero (they count in the mean); the
      released code gives them the mean along arbitrary vectors.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]])}
    >>> iso_c(taus)["w"].round(4).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    del key
    _compose.choice("iso_c", "polar", polar, _polar.POLAR)
    return _spectral.merge(
        "iso_c", taus, weights, matrices, _common, (polar,), check_finite=check_finite
    )


def _common(x, polar):
    """[T, B, m, n] -> [B, m, n]."""
    total = x.sum(0)
    flat = _polar.polar(total, polar)
    mean = (flat * total).sum((-2, -1), keepdims=True) / min(x.shape[-2:])
    return mean * flat


def iso_cts(
    taus: Any,
    *,
    common: float = 0.8,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    layout: _spectral.Layout = "in_out",
    svd: _spectral.TopSvd = "svd",
    polar: _polar.Polar = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Makes isotropic a common subspace and, beside it, one of each task.

      U_c S_c V_c^T    the leading c triplets of sum_t w_t tau_t
      U_t S_t V_t^T    the leading (k - c) / T triplets of (I - U_c U_c^T) w_t tau_t
      result = mean(S) P([U_1 ... U_T U_c]) P([V_1 ... V_T V_c])^T

    with k = min(m, n) columns in all, P(X) = X (X^T X)^(-1/2), U on the side of the
    outputs, and S of all the triplets.

    Args:
      taus: task tree, leaves [T, ...].
      common: fraction of the k directions that are common; the rest is rounded to a
        multiple of T.
      weights: [T], ones by default; they multiply the task vectors.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become the
        weighted mean.
      layout: of the matrices, "in_out" as Flax has kernels, "out_in" as PyTorch.
      svd: how singular vectors are found, "svd", "gram" or "sketch".
      polar: how P is found, "svd", "gram" or "newton"; see `iso_c`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, a fraction outside [0, 1], weights
        that do not fit or sum to zero, or NaN or infinity.

    Follows: Marczak et al. 2025, "No Task Left Behind", algorithm 2, Iso-CTS.
    Differs: directions that are not there are left out of P and count in the mean as
      0, as in `iso_c`. Where rounding would leave less than no common directions, as
      for k = 3 and T = 2, each task gets one less.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]])}
    >>> iso_cts(taus, common=1.0)["w"].round(4).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    del key
    share("iso_cts", "common", common, 1)
    _compose.choice("iso_cts", "svd", svd, _spectral.TOP_SVD)
    _compose.choice("iso_cts", "polar", polar, _polar.POLAR)
    return _spectral.merge(
        "iso_cts",
        taus,
        weights,
        matrices,
        _common_and_own,
        (float(common), svd, polar),
        layout=layout,
        check_finite=check_finite,
    )


def _common_and_own(x, common, svd, polar):
    """[T, B, m, n] -> [B, m, n]."""
    count, k = x.shape[0], min(x.shape[-2:])
    own = min(round((k - share("iso_cts", "common", common, k)) / count), k // count)
    total = x.sum(0)
    u, s, vt = _spectral.svd(total, k - own * count, svd)
    if svd != "svd":
        u = transpose(_spectral.orthonormal_rows(transpose(u)))
        vt = _spectral.orthonormal_rows(vt)
    flat = matmul(u, vt)
    if own:
        u_own, s_own, vt_own = _own(x, u, s, own, svd)
        left = _polar.polar(jnp.concatenate(list(u_own), -1), polar)
        flat = flat + _beside(u, vt, left, jnp.concatenate(list(vt_own), -2), polar)
        s = jnp.concatenate([*s_own, s], -1)
    return s.mean(-1)[..., None, None] * flat


def _own(x, u, s, rank, method):
    """Leading triplets of (I - u u^T) x_t.

    Where the columns of u are all there, they are sought in the complement of so few
    directions that a sketch is not needed.
    """
    within = matmul(u, transpose(u))
    away = _spectral.identity(within) - within
    # Twice, since u is orthonormal to about m eps only.
    away = matmul(away, away)

    def all_of_it():
        u_own, s_own, vt_own = _spectral.svd(matmul(away, x), rank, method)
        # Of rounding alone, they might lie anywhere.
        return matmul(away, u_own), s_own, vt_own

    def complement():
        start = jax.random.normal(jax.random.key(0), (u.shape[-2], rest), x.dtype)
        rows = _spectral.orthonormal_rows(transpose(matmul(away, start)))
        # Again, as in what was small there is rounding of u.
        rows = _spectral.orthonormal_rows(matmul(rows, away))
        quick = "gram" if method == "sketch" else method
        small, s_own, vt_own = _spectral.svd(matmul(rows, x), rank, quick)
        return matmul(transpose(rows), small), s_own, vt_own

    rest = u.shape[-2] - u.shape[-1]
    if rest < rank or 2 * rest > min(x.shape[-2:]):
        return all_of_it()
    return jax.lax.cond((s[..., -1] > 0).all(), complement, all_of_it)


def _beside(u, vt, left, right, polar):
    """P([left u]) P([right v])^T - u v^T, where u, v and left are orthonormal.

    Left is orthogonal to u. Directions of v orthogonal to `right` stay as they are: the
    rest, v q, are no more than there are rows of `right`, and so is the problem.
    """
    q = stacked(jnp.linalg.qr, matmul(vt, transpose(right)))[0]
    shared = matmul(transpose(q), vt)
    both = _polar.polar(jnp.concatenate([right, shared], -2), polar)
    own, rest = jnp.split(both, [right.shape[-2]], -2)
    return matmul(left, own) + matmul(matmul(u, q), rest - shared)
