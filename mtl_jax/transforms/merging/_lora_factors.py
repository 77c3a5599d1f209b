"""Adapters of task vectors that were trained in full, and one gauge for several."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax._lapack import stacked
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.adapters._nodes import put
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.merging._lora_merge import halved, is_pair, shortened


def lora_from_taus(
    taus: Any,
    *,
    rank: int,
    matrices: _spectral.Matrices = None,
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> list[Any]:
    r"""Adapters of the largest singular values of task vectors.

      tau_t = U S V^T,   a_t = U S^(1/2),   b_t = S^(1/2) V^T     the `rank` largest

    Args:
      taus: task tree, leaves [T, ...].
      rank: of every adapter; columns beyond the rank that a matrix has are zeros.
      matrices: which leaves are matrices, (name, shape) -> bool, in the last two axes,
        those before them batched; None: leaves of exactly two axes. The others are left
        out: no adapter changes them.
      svd: how singular vectors are found; see `tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      T adapters {"a": [..., in, r], "b": [..., r, out]} with scale 1, in the dtypes of
      `taus`: use them with `alpha` = r.

    Raises:
      ValueError: a rank below 1, no matrix, or NaN or infinity.

    Follows: Eckart and Young 1936; the split of S in two roots keeps both factors of
      one size.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[4.0, 0.0], [0.0, 1.0]]])}
    >>> [adapter] = lora_from_taus(taus, rank=1)
    >>> (adapter["w"]["a"] @ adapter["w"]["b"]).round(4).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    _compose.choice("lora_from_taus", "svd", svd, _spectral.TOP_SVD)
    if rank < 1:
        raise ValueError(f"lora_from_taus: rank is {rank}, wanted at least 1")
    count, _ = _compose.check_taus("lora_from_taus", taus, None, check_finite)
    views, named = _spectral.views("lora_from_taus", taus, matrices), named_leaves(taus)
    for name, (lead, rows) in views.items():
        if lead + rows + 1 != named[name].ndim - 1 or rows != 1:
            raise ValueError(
                f"lora_from_taus: matrices sees {name!r} of {named[name].shape[1:]} as "
                f"({lead}, {rows}), wanted the last two axes"
            )
    if not views:
        raise ValueError("lora_from_taus: no leaf of taus is a matrix")
    adapters: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in views:
        found = _factors(named[name], rank, svd)
        for adapter, pair in zip(adapters, lora.unstack(found), strict=True):
            put(adapter, name.split("/"), pair)
    return adapters


def lora_align(loras: Sequence[Any], *, check_finite: bool = True) -> list[Any]:
    r"""The same products from factors that lie as close as they can to the first's.

      a_t R_t,  R_t^T b_t,   R_t = argmin |a_t R - a_0|^2 + |R^T b_t - b_0|^2
                                 = polar(a_t^T a_0 + b_t b_0^T)

    of balanced factors U S^(1/2), S^(1/2) V^T. An adapter is known up to a turn of its
    rank only; turned alike, several share more of what `rmm_basis` can store once.

    Args:
      loras: T adapters of the same leaves and ranks.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      T adapters in the dtypes of the given ones.

    Raises:
      ValueError: adapters of different leaves, shapes or ranks, or NaN or infinity.

    Follows: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes
      problem".
    Differs: no paper asks for it; adapters trained from one common initial `a` have a
      gauge in common already, which the balanced split gives up.

    >>> import jax.numpy as jnp
    >>> one = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> other = {"w": {"a": -jnp.ones((2, 1)), "b": -jnp.ones((1, 2))}}
    >>> one, other = lora_align([one, other])
    >>> bool(jnp.allclose(one["w"]["a"], other["w"]["a"], atol=1e-4))
    True
    """
    loras = list(loras)
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"lora_align: adapter {t}", each)
    bank = lora.stack(loras)
    return lora.unstack(jax.tree.map(_aligned, bank, is_leaf=is_pair))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _factors(x, rank, method):
    """[T, ..., in, out] -> {"a": [T, ..., in, r], "b": [T, ..., r, out]}."""
    wide = x.astype(tree.wide_dtype(x.dtype))
    found = halved(*_spectral.svd(wide, min(rank, *x.shape[-2:]), method), rank)
    return jax.tree.map(lambda y: y.astype(x.dtype), found)


@jax.jit
def _aligned(node):
    """{"a": [T, ..., in, r], "b": [T, ..., r, out]}, turned to the first task's."""
    wide = {k: x.astype(tree.wide_dtype(x.dtype)) for k, x in node.items()}
    even = shortened(wide, node["a"].shape[-1])
    a, b = even["a"], even["b"]
    overlap = _spectral.matmul(_spectral.transpose(a), a[:1])
    overlap += _spectral.matmul(b, _spectral.transpose(b[:1]))
    # All of the rank, also where the overlap has less: the product must stay.
    u, _, vt = stacked(jnp.linalg.svd, overlap)
    turn = _spectral.matmul(u, vt)
    a = _spectral.matmul(a, turn)
    b = _spectral.matmul(_spectral.transpose(turn), b)
    return {"a": a.astype(node["a"].dtype), "b": b.astype(node["b"].dtype)}
