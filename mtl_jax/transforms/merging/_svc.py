"""Singular value calibration: takes back what tasks count more than once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves, number
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.merging._arithmetic import task_arithmetic


def svc(
    taus: Any,
    *,
    rule: Callable[..., Any] = task_arithmetic,
    alpha: float = 1.0,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    layout: _spectral.Layout = "in_out",
    svd: _spectral.Svd = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Merges by any rule, then shrinks the directions that tasks share.

      rule(tau_1, ..., tau_T) = sum_r s_r u_r v_r^T     u_r: outputs
      c_rt   = <s_r v_r, u_r^T tau_t> / |u_r^T tau_t|^2
      gamma_r = T / sum_t max(alpha, c_rt)
      result = sum_r gamma_r s_r u_r v_r^T

    Args:
      taus: task tree, leaves [T, ...].
      rule: any merge, (taus, weights=, key=) -> delta; options by `functools.partial`.
      alpha: positive; what a task counts at least. With 1 nothing is amplified.
      weights: [T], for the rule; ones by default. Tasks are compared unweighted.
      key: for the rule.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves are the rule's.
      layout: of the matrices, "in_out" as Flax has kernels, "out_in" as PyTorch.
      svd: how u_r are found, "svd" or "gram".
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, an alpha that is not positive, NaN or
        infinity, or what the rule raises.

    Follows: "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging"
      (arXiv 2602.05536), algorithm 1, as in FusionBench.
    Differs: a task that is zero along u_r counts alpha there, where the formula divides
      by zero. The merge is the delta before any scale; scaling it by s first, as is
      usual for task arithmetic, is `rule=partial(task_arithmetic, weights=...)` or
      `weights` of s.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]]])}
    >>> svc(taus)["w"].round(4).tolist()
    [[3.0, 0.0], [0.0, 1.0]]
    """
    _compose.choice("svc", "svd", svd, _spectral.SVD)
    _compose.choice("svc", "layout", layout, _spectral.LAYOUT)
    alpha = number("svc", "alpha", alpha)
    if not alpha > 0:
        raise ValueError(f"svc: alpha is {alpha}, wanted more than 0")
    _, weights = _compose.check_taus("svc", taus, weights, check_finite)
    views, named = _spectral.views("svc", taus, matrices), named_leaves(taus)
    merged = rule(taus, weights=weights, key=key)
    return tree.map_with_path(
        lambda name, y: (
            _calibrate(named[name], y, views[name], layout, alpha, svd)
            if name in views
            else y
        ),
        merged,
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _calibrate(x, merged, view, layout, alpha, method):
    tasks = _spectral.to_matrices(x, view, layout)
    total = _spectral.to_matrices(merged[None], view, layout)[0]
    u = _spectral.svd(total, method=method)[0]
    left = _spectral.transpose(u)
    own, all_ = _spectral.matmul(left, tasks), _spectral.matmul(left, total)
    norms = (own * own).sum(-1)
    counts = (own * all_[None]).sum(-1) * _spectral.inverse(norms)
    gamma = x.shape[0] / jnp.maximum(counts, alpha).sum(0)
    return _spectral.from_matrices(
        _spectral.matmul(u, gamma[..., None] * all_), x, layout
    )
