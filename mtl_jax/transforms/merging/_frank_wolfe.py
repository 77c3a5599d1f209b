"""Frank-Wolfe merging: step by step towards the expert that a loss asks for."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mtl_jax._checks import number
from mtl_jax.transforms.merging import _coefficients, _compose, _learning

Selection = Literal["hard", "soft"]


class FrankWolfe(NamedTuple):
    """Where the steps led.

    Attributes:
      coeffs: tree like the task vectors with leaves [T], for `compose` or `combine`.
      vertices: tree like it with leaves [S, T], towards what every step went.
      losses: [S, tasks] float32, of every step before its move.
    """

    coeffs: Any
    vertices: Any
    losses: jax.Array


def frank_wolfe(
    base: Any,
    taus: Any,
    loss_fn: Any,
    batches: Any,
    *,
    selection: Selection = "hard",
    scope: _compose.Scope = "leaf",
    start: Any = 0.0,
    scale: float = 1.0,
    step_size: float = 1.0,
    tasks: Any = None,
    args: Any = None,
    check_finite: bool = True,
) -> FrankWolfe:
    r"""Merges inside of the convex hull of experts, by descent without projection.

      g     = sum_k d loss_k / d theta                     at theta = base + c_s . taus
      v_s   = argmin of <g, v . taus>                      over v in {start, scale e_t}
      c_s+1 = c_s + gamma_s (v_s - c_s),   gamma_s = min(1, 2 step_size / (s + 2))

    What is kept is the coefficient of every expert, leaf by leaf: <g, tau_t> is the
    slope along it.

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...].
      loss_fn: `loss_fn(params, batch, task, args) -> scalar`, of one task; a function
        of a module, so that equal calls compile once.
      batches: leaves [S, tasks, ...], one step of every task after the other.
      selection: "hard", one expert by the gradient of the sum of the losses; "soft",
        the mean of those that the tasks' own gradients choose.
      scope: "leaf", every leaf goes to an expert of its own; "global", all to one.
      start: coefficients to start from and, the pull back, to choose as well: a number,
        [T], or a tree like `taus` with leaves [T].
      scale: of the experts' task vectors at the corners.
      step_size: 1 is the method of Frank and Wolfe, which forgets the start at once;
        the authors' experiments take smaller steps.
      tasks: leaves [tasks, ...], what differs between tasks and stays; see `learner`.
      args: any arrays that the loss takes.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      `FrankWolfe`; all steps run in one `lax.scan`. A slope that is NaN makes the
      coefficients NaN from there on.

    Raises:
      ValueError: trees that do not fit, an option outside of its range, or NaN or
        infinity.

    Follows: Chen et al. 2025, "FW-Merging: Scaling Model Merging with Frank-Wolfe
      Optimization", hard and soft selection, by model and by layer.
    Differs: the inner product is the one of the linear minimisation; FusionBench's hard
      selection takes cosines with the whole checkpoint, and its scale shortens the
      steps instead of the corners. Its soft selection lets no two
      tasks choose the same expert and learns how to add them up (that is `learner` on
      these coefficients).

    >>> base, taus = {"w": jnp.zeros(2)}, {"w": jnp.eye(2)}
    >>> def loss_fn(params, batch, task, args):
    ...     return jnp.sum((params["w"] - batch) ** 2)
    >>> batches = jnp.broadcast_to(jnp.array([0.7, 0.3]), (100, 1, 2))
    >>> found = frank_wolfe(base, taus, loss_fn, batches)
    >>> [round(c, 1) for c in found.coeffs["w"].tolist()]
    [0.7, 0.3]
    """
    name = "frank_wolfe"
    _compose.choice(name, "selection", selection, get_args(Selection))
    _compose.choice(name, "scope", scope, ("global", "leaf"))
    scale, step_size = (
        number(name, k, v) for k, v in (("scale", scale), ("step_size", step_size))
    )
    if not 0 < step_size <= 1:
        raise ValueError(f"{name}: step_size is {step_size}, wanted 0 < step_size <= 1")
    _compose.check_taus(name, taus, None, check_finite)
    start = _coefficients.spread(name, taus, start)
    return _walk(
        loss_fn, selection, scope, base, taus, start, scale, step_size,
        batches, tasks, args,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _walk(
    loss_fn, selection, scope, base, taus, start, scale, step_size,
    batches, tasks, args,
):  # fmt: skip
    count = jax.tree.leaves(taus)[0].shape[0]
    corners = jax.tree.map(
        lambda row: jnp.concatenate([row[None], scale * jnp.eye(count)]), start
    )

    def merged(coeffs, _):
        return _coefficients.compose(base, taus, coeffs)

    def lowest(corners, values):
        # The least of numbers with NaN is any of them.
        return jnp.where(jnp.isnan(values).any(), jnp.nan, corners[jnp.argmin(values)])

    def choose(slopes):
        values = jax.tree.map(lambda v, s: v @ s, corners, slopes)
        if scope == "global":
            total = sum(jax.tree.leaves(values))
            values = jax.tree.map(lambda _: total, values)
        return jax.tree.map(lowest, corners, values)

    def soft(coeffs, batch):
        def one(item):
            batch, task = jax.tree.map(lambda x: x[None], item)
            losses, slopes = _learning.slopes(
                merged, loss_fn, coeffs, batch, task, args
            )
            return losses[0], choose(slopes)

        losses, chosen = jax.lax.map(one, (batch, tasks))
        return losses, jax.tree.map(lambda v: v.mean(0), chosen)

    def step(coeffs, item):
        turn, batch = item
        if selection == "soft":
            losses, chosen = soft(coeffs, batch)
        else:
            losses, slopes = _learning.slopes(
                merged, loss_fn, coeffs, batch, tasks, args
            )
            chosen = choose(slopes)
        gamma = jnp.minimum(2 * step_size / (turn + 2), 1)
        coeffs = jax.tree.map(lambda c, v: c + gamma * (v - c), coeffs, chosen)
        return coeffs, (chosen, losses)

    turns = jnp.arange(jax.tree.leaves(batches)[0].shape[0], dtype=jnp.float32)
    coeffs, (chosen, losses) = jax.lax.scan(step, start, (turns, batches))
    return FrankWolfe(coeffs, chosen, losses)
