"""Merges of low-rank adapters in product space: sums of products, not of factors."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._lapack import stacked
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.merging import _compose, _spectral


def lora_cat(
    loras: Sequence[Any],
    *,
    alpha: float | Sequence[float],
    weights: Any = None,
    key: Any = None,
    rslora: bool = False,
    check_finite: bool = True,
) -> Any:
    r"""One adapter whose product is the weighted sum of products, exactly.

      a = [a_1 ... a_T],   b = [w_1 s_1 b_1; ...; w_T s_T b_T]
      a b = sum_t w_t s_t a_t b_t

    Args:
      loras: T adapters of the same leaves, {"a": [..., in, r], "b": [..., r, out]};
        ranks may differ.
      alpha: of the scale s_t = alpha / r_t; one for all, or one for each.
      weights: [T], ones by default.
      key: unused; every merge takes one.
      rslora: s_t = alpha / sqrt(r_t).
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      An adapter with scale 1, rank r_1 + ... + r_T: use it with `alpha` of its rank.

    Raises:
      ValueError: no adapters, adapters of different leaves, weights that do not fit, or
        NaN or infinity.

    Follows: the "cat" combination of the PEFT library, in which the product is exact.
    Differs: `adapters.lora.combine` with checks; nothing beside it.

    >>> import jax.numpy as jnp
    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> both = lora_cat([adapter, adapter], alpha=1.0)
    >>> (both["w"]["a"] @ both["w"]["b"]).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    del key
    return _cat("lora_cat", loras, alpha, weights, rslora, check_finite)


def lora_svd(
    loras: Sequence[Any],
    *,
    rank: int,
    alpha: float | Sequence[float],
    weights: Any = None,
    key: Any = None,
    rslora: bool = False,
    check_finite: bool = True,
) -> Any:
    r"""The best adapter of a given rank for the weighted sum of products.

      sum_t w_t s_t a_t b_t = Q_a (R_a R_b^T) Q_b^T,   R_a R_b^T = U S V^T
      a = Q_a U S^(1/2),   b = S^(1/2) V^T Q_b^T       the `rank` largest

    from QR of the concatenated factors: no matrix [in, out] is ever formed, the SVD is
    of at most r_1 + ... + r_T rows and columns.

    Args:
      loras: T adapters of the same leaves; ranks may differ. See `lora_cat`.
      rank: of the result; columns beyond the rank that is there are zeros.
      alpha: of the scale s_t = alpha / r_t; one for all, or one for each.
      weights: [T], ones by default.
      key: unused; every merge takes one.
      rslora: s_t = alpha / sqrt(r_t).
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      An adapter with scale 1 and this rank: use it with `alpha` = `rank`.

    Raises:
      ValueError: as `lora_cat`, or a rank below 1.

    Follows: Eckart and Young 1936, the "svd" combination of the PEFT library.
    Differs: PEFT takes the SVD of the product [out, in] and puts S on one side; here
      both factors get its root, and the cost is that of the ranks.

    >>> import jax.numpy as jnp
    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> both = lora_svd([adapter, adapter], rank=1, alpha=1.0)
    >>> (both["w"]["a"] @ both["w"]["b"]).round(4).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    del key
    if rank < 1:
        raise ValueError(f"lora_svd: rank is {rank}, wanted at least 1")
    wide = [
        jax.tree.map(lambda x: x.astype(tree.wide_dtype(x.dtype)), each)
        for each in loras
    ]
    joined = _cat("lora_svd", wide, alpha, weights, rslora, check_finite)
    dtypes = jax.tree.map(lambda x: x.dtype, loras[0])
    short = jax.tree.map(lambda node: shortened(node, rank), joined, is_leaf=is_pair)
    return jax.tree.map(lambda x, dtype: x.astype(dtype), short, dtypes)


def is_pair(node: Any) -> bool:
    """Whether this is the node of one adapted leaf."""
    return isinstance(node, dict) and set(node) == {"a", "b"}


def _cat(fn_name, loras, alpha, weights, rslora, check_finite):
    loras = list(loras)
    weights = jnp.ones(len(loras)) if weights is None else weights
    weights = _compose.numbers(fn_name, "weights", weights)
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"{fn_name}: adapter {t}", each)
    return lora.combine(loras, weights, alpha=alpha, rslora=rslora)


@functools.partial(jax.jit, static_argnums=1)
def shortened(node: Any, rank: int) -> Any:
    """A pair of any rank -> the best pair of this rank."""
    left, r_left = stacked(jnp.linalg.qr, node["a"])
    right, r_right = stacked(jnp.linalg.qr, _spectral.transpose(node["b"]))
    core = _spectral.matmul(r_left, _spectral.transpose(r_right))
    pair = halved(*_spectral.svd(core, min(rank, *core.shape[-2:])), rank)
    return {
        "a": _spectral.matmul(left, pair["a"]),
        "b": _spectral.matmul(pair["b"], _spectral.transpose(right)),
    }


def halved(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> dict[str, Any]:
    """A pair for u s v^T, of which both have the root of s, zeros up to the rank."""
    root = jnp.sqrt(s)
    spare, more = [(0, 0)] * (u.ndim - 2), (0, rank - s.shape[-1])
    return {
        "a": jnp.pad(u * root[..., None, :], [*spare, (0, 0), more]),
        "b": jnp.pad(root[..., None] * vt, [*spare, more, (0, 0)]),
    }
