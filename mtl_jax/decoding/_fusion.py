"""Fusing the logits of several models at every token: a large one steered by experts.

The logits of a large model are shifted along what fine-tuning did to a small one,
d_t = expert_t - small. How far is solved at every token: as far, in KL divergence, as
the experts went from the small model.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

_FLOOR = -1e30  # Below every logit, and finite.
_BLOCK = 4096
TIE = 1e-3  # Experts whose objectives differ by less are counted as tied.
Method = Literal["grid", "bisect"]


class KlStats(NamedTuple):
    """Of p_s = softmax(logits + s direction), for every s.

    Attributes:
      forward: [B, N] float32, KL(p_s || p_0).
      backward: [B, N] float32, KL(p_0 || p_s).
      slope: [B, N] float32, d backward / d s; d forward / d s is s times `variance`.
      variance: [B, N] float32, of the direction under p_s.
    """

    forward: chex.Array
    backward: chex.Array
    slope: chex.Array
    variance: chex.Array


def logit_kl_stats(
    logits: chex.Array, direction: chex.Array, alphas: chex.Array
) -> KlStats:
    r"""How far logits move in KL divergence along a direction, for all steps at once.

      A(s) = log sum_v p_v exp(s d_v),   p = softmax(logits),  E_p[d] = 0
      KL(p_s || p) = s A'(s) - A(s),   KL(p || p_s) = A(s)

    The vocabulary is read once, in blocks: for every row and step a running maximum,
    sum, and first and second moment. Both divergences are 0 at 0 and do not decrease
    for s >= 0.

    Args:
      logits: [B, V] floating point; -inf for tokens that do not exist.
      direction: [B, V]; a constant added to a row changes nothing.
      alphas: [N], steps s of all rows, or [B, N].

    Returns:
      `KlStats`.

    Raises:
      ValueError: if shapes do not fit.
    """
    if logits.ndim != 2 or logits.shape != direction.shape:
        raise ValueError(
            "logit_kl_stats: wanted logits and direction [B, V], found "
            f"{logits.shape} and {direction.shape}"
        )
    rows = logits.shape[0]
    alphas = jnp.asarray(alphas, jnp.float32)
    if alphas.shape not in (alphas.shape[-1:], (rows, *alphas.shape[-1:])):
        raise ValueError(
            f"logit_kl_stats: alphas are {alphas.shape}, wanted [N] or [{rows}, N]"
        )
    if alphas.ndim == 1:
        alphas = alphas[None]
    alphas = jnp.broadcast_to(alphas, (rows, alphas.shape[1]))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    there = log_p > -jnp.inf
    move = jnp.where(there, direction.astype(jnp.float32), 0)
    mean = jnp.sum(jnp.where(there, jnp.exp(log_p) * move, 0), 1, keepdims=True)
    move = jnp.where(there, move - mean, 0)
    most, total, first, second = _moments(log_p, move, alphas)
    grown = most + jnp.log(total)
    at = first / total
    variance = jnp.maximum(second / total - at * at, 0)
    forward = jnp.maximum(alphas * at - grown, 0)
    return KlStats(forward, jnp.maximum(grown, 0), at, variance)


def _moments(log_p, move, alphas):
    """Running maximum of log p + s d, and sums of exp(that - maximum) (1, d, d^2)."""
    rows, size = log_p.shape
    block = min(_BLOCK, size)
    width = -(-size // block) * block

    def blocks(x, fill):
        x = jnp.pad(x, ((0, 0), (0, width - size)), constant_values=fill)
        return jnp.moveaxis(x.reshape(rows, -1, block), 1, 0)

    def step(carry, item):
        most, *sums = carry
        own, d = item[0][:, None], item[1][:, None]
        x = own + alphas[:, :, None] * d
        new = jnp.maximum(most, jnp.max(x, 2))
        e = jnp.exp(x - new[:, :, None])
        old = jnp.exp(most - new)
        terms = (e, e * d, e * d * d)
        sums = [old * s + jnp.sum(t, 2) for s, t in zip(sums, terms, strict=True)]
        return (new, *sums), None

    zeros = jnp.zeros_like(alphas)
    start = (jnp.full_like(zeros, _FLOOR), zeros, zeros, zeros)
    items = (blocks(log_p, -jnp.inf), blocks(move, 0.0))
    return jax.lax.scan(step, start, items)[0]


class Targets(NamedTuple):
    """How far the experts went from the small model.

    Attributes:
      forward: [T, B] float32, KL(expert || small).
      backward: [T, B] float32, KL(small || expert).
    """

    forward: chex.Array
    backward: chex.Array


def expert_targets(small: chex.Array, experts: chex.Array) -> Targets:
    """Divergences between experts and the small model that they were tuned from.

    Args:
      small: [B, V], logits of the small model; -inf for tokens that do not exist.
      experts: [T, B, V], logits of the experts.

    Returns:
      `Targets`.

    Raises:
      ValueError: if shapes do not fit.
    """
    if experts.ndim != 3 or experts.shape[1:] != small.shape:
        raise ValueError(
            "expert_targets: wanted small [B, V] and experts [T, B, V], found "
            f"{small.shape} and {experts.shape}"
        )
    there = small > -jnp.inf
    q = jax.nn.log_softmax(small.astype(jnp.float32), axis=-1)
    moved = jnp.where(there[None], experts.astype(jnp.float32), -jnp.inf)
    t = jax.nn.log_softmax(moved, axis=-1)
    gap = jnp.where(there[None], t - q[None], 0)
    return Targets(
        jnp.sum(jnp.where(there[None], jnp.exp(t) * gap, 0), -1),
        jnp.sum(jnp.where(there[None], -jnp.exp(q)[None] * gap, 0), -1),
    )


class Fusion(NamedTuple):
    """What was solved for each row.

    Attributes:
      alpha: [B] float32, how far.
      expert: [B] int32, along which expert.
      loss: [B] float32, the objective there.
      tied: [B] bool, another expert comes as near, see `TIE`.
    """

    alpha: chex.Array
    expert: chex.Array
    loss: chex.Array
    tied: chex.Array


def solve_alpha(
    logits: chex.Array,
    directions: chex.Array,
    targets: Targets,
    *,
    method: Method = "grid",
    high: float = 2.0,
    step: float = 0.1,
) -> Fusion:
    r"""Finds for each row the expert and the step that move it as far as the experts.

      min over t, s of sum_i (KL(p_s || p) - f_i)^2 + (KL(p || p_s) - b_i)^2

    with p_s = softmax(logits + s directions_t) and f, b the targets. The sum over i is
    T times the squared distance to the mean target and a constant, so that the
    objective sees how far to go and not which expert fits; of equal ones the first
    is taken.

    Args:
      logits: [B, V], of the large model.
      directions: [T, B, V], expert - small.
      targets: from `expert_targets`.
      method: "grid" tries 0, step, ..., high for every expert; "bisect" halves the
        interval [0, high], as often as gives a grid of 2^-14, after the sign of the
        slope: the minimum lies between the two steps that match one divergence each,
        where there is only one (it may be a local one).
      high: longest step.
      step: of the grid.

    Returns:
      `Fusion`.

    Raises:
      ValueError: shapes that do not fit, a method that does not exist, or an empty
        range.

    **Follows**: Fan et al. 2024, "On Giant's Shoulders: Effortless Weak to Strong by
    Dynamic Logits Fusion", its grid from 0 to 2 in steps of 0.1, one expert active at
    a time.

    **Differs**: divergences come from moments of one pass over the vocabulary; the
    running minimum starts anew at every token; bisection is ours.
    """
    if directions.ndim != 3 or directions.shape[1:] != logits.shape:
        raise ValueError(
            "solve_alpha: wanted logits [B, V] and directions [T, B, V], found "
            f"{logits.shape} and {directions.shape}"
        )
    if method not in get_args(Method):
        raise ValueError(
            f"solve_alpha: method is {method!r}, wanted one of {get_args(Method)}"
        )
    if not 0 < step <= high:
        raise ValueError(f"solve_alpha: wanted 0 < step={step} <= high={high}")

    def objective(stats: KlStats) -> chex.Array:
        forward, backward = (x[:, :, None] for x in targets)
        gaps = (stats.forward[None] - forward, stats.backward[None] - backward)
        return jnp.sum(jnp.square(gaps[0]) + jnp.square(gaps[1]), 0)

    if method == "grid":
        count = int(np.floor(high / step + 1e-6)) + 1
        grid = jnp.asarray(np.arange(count) * float(step), jnp.float32)
        found = [objective(logit_kl_stats(logits, d, grid)) for d in directions]
        best = [jnp.argmin(loss, 1) for loss in found]
        alphas = jnp.stack([grid[i] for i in best])
        losses = jnp.stack([jnp.min(loss, 1) for loss in found])
    else:
        alphas = jnp.stack([_bisect(logits, d, targets, high) for d in directions])
        losses = jnp.stack(
            [
                objective(logit_kl_stats(logits, d, a[:, None]))[:, 0]
                for d, a in zip(directions, alphas, strict=True)
            ]
        )
    expert = jnp.argmin(losses, 0).astype(jnp.int32)
    loss = jnp.min(losses, 0)
    near = jnp.sum(losses - loss[None] < TIE, 0)
    alpha = jnp.take_along_axis(alphas, expert[None], 0)[0]
    return Fusion(alpha, expert, loss, near > 1)


def _bisect(logits, direction, targets, high):
    """The step where the objective stops falling, for one expert, [B]."""
    forward, backward = (jnp.mean(x, 0)[:, None] for x in targets)

    def halve(_, bounds):
        low, top = bounds
        middle = (low + top) / 2
        stats = logit_kl_stats(logits, direction, middle)
        rise = (stats.forward - forward) * middle * stats.variance
        rise += (stats.backward - backward) * stats.slope
        up = rise > 0
        return jnp.where(up, low, middle), jnp.where(up, middle, top)

    start = jnp.zeros_like(forward)
    low, top = jax.lax.fori_loop(0, 14, halve, (start, start + high))
    return ((low + top) / 2)[:, 0]


def fuse_logits(
    logits: chex.Array, directions: chex.Array, alpha: chex.Array, expert: chex.Array
) -> chex.Array:
    """Logits moved along the expert of each row, `logits + alpha directions[expert]`.

    Args:
      logits: [B, V].
      directions: [T, B, V], expert - small.
      alpha: [B].
      expert: [B] integer.

    Returns:
      [B, V] float32; tokens that do not exist, with -inf, stay so.
    """
    own = jnp.take_along_axis(directions, expert[None, :, None], axis=0)[0]
    moved = logits + alpha[:, None] * own
    return jnp.where(logits > -jnp.inf, moved, logits)


@dataclasses.dataclass(frozen=True)
class DynamicFusion:
    """`fuse` of `fused((large, small, *experts), DynamicFusion())`.

    Every step records the `Fusion` of every row.

    Attributes:
      method: see `solve_alpha`, as for the rest.
      high: longest step.
      step: of the grid.
    """

    method: Method = "grid"
    high: float = 2.0
    step: float = 0.1

    def __call__(
        self, logits: tuple[chex.Array, ...]
    ) -> tuple[chex.Array, dict[str, chex.Array]]:
        """Logits [B, V] of large, small and experts -> (fused, record)."""
        large, small, experts = _parts(logits)
        directions = experts - small[None]
        found = solve_alpha(
            large, directions, expert_targets(small, experts), **vars(self)
        )
        fused_logits = fuse_logits(large, directions, found.alpha, found.expert)
        return fused_logits, found._asdict()


@dataclasses.dataclass(frozen=True)
class StaticFusion:
    """`fuse` of `fused((large, small, *experts), StaticFusion(1.0))`: proxy tuning.

      large + alpha sum_t (expert_t - small)

    Attributes:
      alpha: the same at every token.

    **Follows**: Liu et al. 2024, "Tuning Language Models by Proxy", with alpha 1 and
    one expert.
    """

    alpha: float = 1.0

    def __call__(self, logits: tuple[chex.Array, ...]) -> chex.Array:
        """Logits [B, V] of large, small and experts -> fused [B, V]."""
        large, small, experts = _parts(logits)
        moved = large + self.alpha * jnp.sum(experts - small[None], 0)
        return jnp.where(large > -jnp.inf, moved, large)


def _parts(logits):
    if len(logits) < 3:
        raise ValueError(
            f"fusion: wanted a large model, a small one and experts, found "
            f"{len(logits)} models"
        )
    large, small, *experts = logits
    return large, small, jnp.stack(experts)
