"""Experts of rank one: task vectors taken apart before a router mixes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms import merging
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.routing._upscale import RankOne, Upscaled, upscale


def rank_one(
    base: Any,
    taus: Any,
    groups: Mapping[str, str],
    *,
    rank: int,
    static_scale: float = 0.2,
    matrices: _spectral.Matrices = None,
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> Upscaled:
    r"""Splits routed task vectors into experts of rank one, a pool for all inputs.

      tau_t = sum_k s_tk u_tk v_tk^T,    experts a_e = u_tk, b_e = s_tk v_tk, e = (t, k)

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...].
      groups: router -> regular expression of the leaves it mixes, see `upscale`; of
        them matrices are routed, and the others merged.
      rank: r, experts of each task in each matrix; E = T r.
      static_scale: strength of task arithmetic on the leaves that are not routed.
      matrices: which leaves are matrices, (name, shape) -> bool, in the last two axes,
        those before them batched; None: leaves of exactly two axes.
      svd: how singular vectors are found, see `merging.tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      An `Upscaled` of `RankOne` experts in the dtypes of `taus`, those of a task next
      to each other: for routers of T r gates, in `we_moe` or `models.apply_routed`,
      with `select` of them for each input.

    Raises:
      ValueError: a rank below 1 or above what a matrix has, a group without a matrix,
        or as `upscale`.

    Follows: the released code of RankOne-MoE (EnnengYang/RankOne-MoE), as FusionBench
      has it: gates start at `static_scale`, and all experts count; its configuration
      has 0.3 and 32 experts of each task.
    Differs: any group of matrices has a router, not only MLPs.

    >>> base, taus = {"w": jnp.zeros((2, 2))}, {"w": jnp.stack([jnp.eye(2)] * 3)}
    >>> model = rank_one(base, taus, {"all": "w"}, rank=2)
    >>> model.experts["all"]["w"].a.shape
    (6, 2)
    """
    _compose.choice("rank_one", "svd", svd, _spectral.TOP_SVD)
    if rank < 1:
        raise ValueError(f"rank_one: rank is {rank}, wanted at least 1")
    model = upscale(
        base, taus, groups, static_scale=static_scale, check_finite=check_finite
    )
    count = tree.num_tasks("rank_one", taus)
    scales = jnp.full(count, static_scale, jnp.float32)
    experts: dict[str, dict[str, Any]] = {}
    named, params = named_leaves(base), {}
    for router, own in model.experts.items():
        seen = _spectral.views("rank_one", own, matrices)
        if not seen:
            raise ValueError(
                f"rank_one: {groups[router]!r} of {router!r} finds no matrix"
            )
        experts[router] = {name: _experts(name, own[name], rank, svd) for name in seen}
        rest = {name: x for name, x in own.items() if name not in seen}
        if rest:
            params |= merging.compose({n: named[n] for n in rest}, rest, scales)
    merged = tree.map_with_path(lambda name, x: params.get(name, x), model.params)
    return Upscaled(merged, experts)


def _experts(name, x, rank, svd):
    """[T, ..., m, n] -> T r experts."""
    if rank > min(x.shape[-2:]):
        raise ValueError(
            f"rank_one: rank is {rank}, {name!r} has at most {min(x.shape[-2:])}"
        )
    u, s, vt = _spectral.svd(x.astype(tree.wide_dtype(x.dtype)), rank, svd)
    parts = RankOne(_spectral.transpose(u), vt * s[..., None])

    def pool(y):
        y = jnp.moveaxis(y, -2, 1)
        return y.reshape(-1, *y.shape[2:]).astype(x.dtype)

    return jax.tree.map(pool, parts)
