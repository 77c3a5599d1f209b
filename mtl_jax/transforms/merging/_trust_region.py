"""Task arithmetic in a trust region: drop the entries in which tasks collide."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


@jax.jit
def _conflict(x: jax.Array, slopes: jax.Array) -> jax.Array:
    """sum_{s != t} |slope_s| |tau_t|, float32; exactly 0 where one task alone acts."""
    moves = [jnp.abs(v).astype(jnp.float32) for v in x]
    slopes = [jnp.abs(v).astype(jnp.float32) for v in slopes]
    none = jnp.zeros_like(moves[0])
    after = [none]
    for move in moves[:0:-1]:
        after.append(after[-1] + move)
    before, total = none, none
    for move, slope, rest in zip(moves, slopes, reversed(after), strict=True):
        total += slope * (before + rest)
        before += move
    return total


@jax.jit
def _leaf(x, conflict, cutoff, weights):
    wide = tree.wide_dtype(x.dtype)
    dropped = tree.reaches(conflict, cutoff) & (conflict > 0)
    total = jnp.zeros(x.shape[1:], wide)
    for t in range(x.shape[0]):
        total += weights[t].astype(wide) * x[t].astype(wide)
    return jnp.where(dropped, 0, total).astype(x.dtype)


def trust_region(
    taus: Any,
    *,
    density: float = 0.99,
    grads: Any = None,
    scope: _compose.Scope = "global",
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Adds task vectors except where one task moves what another is sensitive to.

      conflict = sum_{s != t} |g_s| |tau_t|
      result = sum_t w_t tau_t on the share of entries with the least conflict, else 0

    Args:
      taus: task tree, leaves [T, ...].
      density: fraction kept, exactly; entries without conflict are never dropped.
      grads: tree like `taus` of gradients of the tasks' losses at the base, or of
        their mean magnitudes; None for the task vectors themselves (zero-shot).
      scope: "global" ranks the model as a whole, "leaf" each leaf by itself.
      weights: [T], ones by default; they do not enter the conflict.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: a density outside [0, 1], a scope that does not exist, gradients or
        weights that do not fit, or NaN or infinity.

    Follows: Sun et al. 2025, "Task Arithmetic in Trust Region".
    Differs: the paper's tau is 1 - density. fusion_bench keeps what is strictly below
      the quantile, so that among equal conflicts, all of them zero for tasks that do
      not overlap, everything is dropped; here counts are exact and zero is kept.

    >>> taus = {"w": jnp.array([[3.0, 0.0, 1.0, 1.0], [2.0, 5.0, 1.0, 0.0]])}
    >>> trust_region(taus, density=0.75)["w"].tolist()
    [0.0, 5.0, 2.0, 1.0]
    """
    del key
    _, weights = _compose.check_taus("trust_region", taus, weights, check_finite)
    _compose.choice("trust_region", "scope", scope, ("global", "leaf"))
    slopes = taus
    if grads is not None:
        tree.check_match(
            "trust_region", taus, grads, reference_name="taus", other_name="grads"
        )
        if check_finite:
            tree.check_finite("trust_region: grads", grads)
        slopes = grads
    leaves, treedef = jax.tree.flatten(taus)
    conflicts = {
        i: tree.settled(_conflict(x, jnp.asarray(g)))
        for i, (x, g) in enumerate(zip(leaves, jax.tree.leaves(slopes), strict=True))
        if tree.is_inexact(x)
    }

    def cutoffs(chosen):
        size = tree.size(chosen)
        kept = _compose.share("trust_region", "density", density, size)
        return tree.tree_top_cutoff(chosen, size - kept, zero_ties=False)

    if scope == "global":
        found = cutoffs(conflicts)
    else:
        found = {i: cutoffs({i: c})[i] for i, c in conflicts.items()}
    return treedef.unflatten(
        [
            _leaf(x, conflicts[i], found[i], weights) if i in conflicts else x[0]
            for i, x in enumerate(leaves)
        ]
    )
