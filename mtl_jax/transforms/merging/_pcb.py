"""PCB: entries compete within their task and between tasks for a share of the merge."""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def _per_task(values: jax.Array, like: jax.Array) -> jax.Array:
    """[T] -> [T, 1, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _over_tasks(x: jax.Array) -> jax.Array:
    """Sum over tasks, written out; a reduction of the first axis is slow on CPUs."""
    return functools.reduce(jnp.add, [x[t] for t in range(x.shape[0])])


@jax.jit
def _clipped(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Magnitudes within the bounds of each task, float32."""
    return jnp.clip(
        jnp.abs(x).astype(jnp.float32), _per_task(low, x), _per_task(high, x)
    )


@jax.jit
def _score(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Balance of every entry, float32 [T, ...]."""
    range_ = _per_task(high - low, x)
    rise = (_clipped(x, low, high) - _per_task(low, x)) / jnp.where(
        range_ > 0, range_, 1
    )
    inner = jnp.exp(x.shape[0] * jnp.square(jnp.where(range_ > 0, rise, 1)))
    x = x.astype(jnp.float32)
    return inner * jnp.tanh(x * _over_tasks(x)[None])


@jax.jit
def _leaf(x, score, clip, floor, peak, weights):
    """Weighted mean of the clipped entries by their scores above the floor."""
    gap = _per_task(peak - floor, x)
    above = (score - _per_task(floor, x)) / jnp.where(gap > 0, gap, 1)
    # Where all scores that count are equal they count whole.
    level = (score >= _per_task(floor, x)).astype(above.dtype)
    share = jnp.where(gap > 0, jnp.clip(above, 0, 1), level)
    values = jnp.sign(x).astype(jnp.float32) * _clipped(x, *clip)
    total = _over_tasks(_per_task(weights, x) * share * values)
    whole = _over_tasks(share)
    return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1), 0).astype(
        x.dtype
    )


def _kth(leaves: list[jax.Array], count: int) -> jax.Array:
    """[T], the count-th largest magnitude of each task over all leaves."""
    cutoff = tree.task_top_cutoffs(leaves, count, zero_ties=False)[0]
    return jax.lax.bitcast_convert_type(cutoff.bits, jnp.float32)


def _kth_signed(scores: list[jax.Array], count: int, length: int) -> jax.Array:
    """[T], the count-th largest value of each task, of either sign."""
    found = _kth([jnp.maximum(s, 0) for s in scores], count)
    if not isinstance(found, jax.core.Tracer) and bool(jnp.all(found > 0)):
        return found
    below = _kth([jnp.maximum(-s, 0) for s in scores], length - count + 1)
    return jnp.where(found > 0, found, -below)


def _merge(leaves: list[jax.Array], density: float, clip: float, weights: jax.Array):
    """PCB of leaves [T, ...] taken as one vector per task."""
    length = sum(x[0].size for x in leaves)
    cut = _compose.share("pcb", "clip", clip, length)
    kept = math.ceil(Fraction(repr(density)) * length)
    bounds = _kth(leaves, length - cut), _kth(leaves, cut + 1)
    scores = [_score(x, *bounds) for x in leaves]
    tops = [jnp.max(s, tuple(range(1, s.ndim))) for s in scores]
    peak = functools.reduce(jnp.maximum, tops)
    floor = _kth_signed(scores, kept, length)
    return [
        _leaf(x, s, bounds, floor, peak, weights)
        for x, s in zip(leaves, scores, strict=True)
    ]


def pcb(
    taus: Any,
    *,
    density: float = 0.1,
    clip: float = 1e-4,
    scope: _compose.Scope = "global",
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Averages task vectors by how their entries fare in competition.

      c_t = sign(tau_t) clip(|tau_t|)           to the magnitudes at its two tails
      b_t = exp(T norm(|c_t|)^2) tanh(tau_t sum_s tau_s)
      s_t = norm(max(b_t, the b_t at the top share))
      result = sum_t w_t s_t c_t / sum_t s_t

    with norm(x) = (x - min x) / (max x - min x) over the entries of a task.

    Args:
      taus: task tree, leaves [T, ...].
      density: share of the entries of a task whose score counts; static.
      clip: share of the entries of a task that is clipped, at each tail.
      scope: "global", entries compete in the whole task; "leaf", in their leaf.
      weights: [T], the paper's lambda, ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`. Scores of the size of `taus` are
      held in float32 meanwhile.

    Raises:
      ValueError: a density outside (0, 1], a clip outside [0, 1/2), an option that
        does not exist, weights that do not fit, a complex leaf, or NaN or infinity.

    Follows: Du et al. 2024, "Parameter Competition Balancing for Model Merging".
    Differs: clipping and the divisor are the released code's, not in the paper. Of n
      entries floor(clip n) are clipped at each tail; the code's index clips one more
      at the top, which in a leaf of two entries clips both to the smaller. Scores
      that are all equal, 0 / 0 in the code, count whole.

    >>> taus = {"w": jnp.array([[3.0, 1.0, 0.1], [1.0, -2.0, 0.1]])}
    >>> [round(v, 3) for v in pcb(taus, density=0.5)["w"].tolist()]
    [3.0, -2.0, 0.0]
    """
    del key
    _, weights = _compose.check_taus("pcb", taus, weights, check_finite)
    _compose.check_real("pcb", taus)
    _compose.choice("pcb", "scope", scope, ("global", "leaf"))
    density = _compose.number("pcb", "density", density)
    if not 0 < density <= 1:
        raise ValueError(f"pcb: density is {density}, wanted 0 < density <= 1")
    clip = _compose.nonnegative("pcb", "clip", clip)
    if not clip < 0.5:
        raise ValueError(f"pcb: clip is {clip}, wanted 0 <= clip < 0.5")
    leaves, treedef = jax.tree.flatten(taus)
    chosen = [i for i, x in enumerate(leaves) if tree.is_inexact(x) and x.size]
    merged = [x[0] for x in leaves]
    groups = [chosen] if scope == "global" else [[i] for i in chosen]
    for group in groups:
        if not group:
            continue
        found = _merge([leaves[i] for i in group], density, clip, weights)
        for i, x in zip(group, found, strict=True):
            merged[i] = x
    return treedef.unflatten(merged)
