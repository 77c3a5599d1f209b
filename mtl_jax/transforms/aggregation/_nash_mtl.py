"""Nash-MTL, the bargaining solution between tasks."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import Aggregator, Rule, from_gramian
from mtl_jax.transforms.aggregation._cosine import cosine_gram, dot
from mtl_jax.transforms.aggregation._fair_grad import fair_shares


class NashState(NamedTuple):
    """State of Nash-MTL.

    Attributes:
      step: int32, number of updates.
      weights: [T], of the last solution, before the norm is bounded.
      shares: [T], the same free of the lengths of the gradients: the next start.
    """

    step: chex.Array
    weights: chex.Array
    shares: chex.Array


def weights(
    gram: chex.Array, *, max_norm: float = 1.0, start: chex.Array | None = None
) -> chex.Array:
    r"""The positive w with `gram @ w = 1 / w`, its update bounded in length.

    All tasks gain alike, `w[t] g_t . d = 1` with d the update, and |d| is the root of T
    before it is bounded, however long the gradients are.

    Args:
      gram: [T, T], inner products of task gradients.
      max_norm: longest update; longer ones are scaled down to it. 0 is no bound.
      start: [T], positive, weights times norms up to a factor, from where to search.

    Returns:
      [T] float32, positive; zero for zero gradients.

    Raises:
      ValueError: `gram` is not square, or a negative `max_norm`.

    **Follows**: Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", alg. 1.
    **Differs**: the equations are those of a strictly convex problem and are solved to
      rounding by Newton's method; the authors linearise it, up to 20 times. Their code
      divides the Gramian by its norm and multiplies by it again in the constraints, so
      that where it converges the equations are these. For dependent gradients the
      cosines have a ridge of 1e-6.

    >>> found = weights(jnp.diag(jnp.array([4.0, 1.0])), max_norm=0)
    >>> print(*(f"{x:.2f}" for x in found))
    0.50 1.00
    """
    return bound(gram, _solve(gram, start)[0], max_norm)


def _solve(gram, start):
    split = cosine_gram("nash_mtl", gram)
    shares = fair_shares(split, 1.0, start)
    return shares * split.inverse, shares


def bound(gram: chex.Array, weights: chex.Array, max_norm: float) -> chex.Array:
    """Scales weights down to an update of length `max_norm`, unless that is 0."""
    if not max_norm >= 0:
        raise ValueError(f"nash_mtl: max_norm is {max_norm}, wanted 0 or more")
    if max_norm == 0:
        return weights
    split = cosine_gram("nash_mtl", gram)
    lengths = weights * split.norms
    norm = jnp.sqrt(jnp.maximum(dot(lengths, dot(split.cosines, lengths)), 0))
    return jnp.where(
        norm > max_norm, weights * (max_norm / jnp.where(norm == 0, 1, norm)), weights
    )


def nash_mtl(num_tasks: int, *, max_norm: float = 1.0, every: int = 1) -> Aggregator:
    """Aggregates by Nash-MTL; see `weights.nash_mtl`.

    Updates: leaves [T, ...] -> [...]. State: a `NashState`; each search starts from the
    last solution.

    Args:
      num_tasks: T.
      max_norm: longest update; 0 is no bound.
      every: solve at every so many updates, and keep the weights in between. With a
        `max_norm` the Gramian is still looked at in every update; `every_k` keeps the
        bounded weights and does not.

    >>> tx = nash_mtl(2, max_norm=0)
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    1.00 1.00
    """
    if every < 1:
        raise ValueError(f"nash_mtl: every is {every}, wanted 1 or more")

    def init():
        # Arrays of their own each: one buffer cannot be donated twice.
        found, shares = jnp.ones((2, num_tasks), jnp.float32)
        return NashState(jnp.zeros((), jnp.int32), found, shares)

    def weigh(gram, state, **extra):
        del extra
        if gram.shape != (num_tasks, num_tasks):
            raise ValueError(
                f"nash_mtl: gram is {gram.shape}, wanted [{num_tasks}, {num_tasks}]"
            )

        def solve():
            found, shares = _solve(gram, state.shares)
            return found.astype(jnp.float32), shares.astype(jnp.float32)

        def keep():
            return state.weights, state.shares

        if every == 1:
            found, shares = solve()
        else:
            found, shares = jax.lax.cond(state.step % every == 0, solve, keep)
        # A search that met NaN is not where the next one starts.
        start = jnp.where(jnp.all(jnp.isfinite(shares)), shares, 1)
        return bound(gram, found, max_norm), NashState(state.step + 1, found, start)

    def due(state):
        return state.step % every == 0

    # A bound on the norm is one for every step.
    known = every > 1 and max_norm == 0
    return from_gramian("nash_mtl", Rule(init, weigh, due=due if known else None))
