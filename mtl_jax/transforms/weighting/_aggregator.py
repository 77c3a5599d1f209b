"""Weightings as aggregators: one mode of the trainer for both families."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.aggregation import Aggregator, Rule, from_gramian
from mtl_jax.transforms.weighting._base import (
    Weighting,
    WeightingState,
    descend,
)


class Before(NamedTuple):
    """What a method that looks at what a step has brought keeps of that step.

    Attributes:
      losses: [T] float32.
      present: bool [T], which tasks the batch had.
      open: bool, whether the method has yet to learn from that step.
    """

    losses: chex.Array
    present: chex.Array
    open: chex.Array


class AsAggregatorState(NamedTuple):
    """State of a weighting that acts as an aggregator.

    Attributes:
      params: what the method learns.
      opt_state: of the optimizer of `params`.
      weighting: `WeightingState` of the method.
      before: `Before` of the last step where the method needs losses after it, else ().
      finite: bool, whether the last losses and norms were finite and what the method
        allows.
    """

    params: Any
    opt_state: Any
    weighting: WeightingState
    before: Any
    finite: chex.Array


def as_aggregator(
    method: Weighting,
    num_tasks: int,
    *,
    tx: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Lets a method of losses stand where an aggregator of gradients is wanted.

    The update is the gradient of `method.loss`: task gradients weighed by its
    derivatives. What the method learns is trained by `tx` inside. The weights depend on
    the losses alone, unless the method needs norms: the trainer then takes one backward
    pass of the weighed losses and forms no task gradient.

    A batch says which tasks it has by the extra argument `present` (bool [T]); without
    it, a task whose loss is exactly zero counts as absent, with weight zero (where the
    method needs norms: whose loss and gradient are both zero).

    Args:
      method: a weighting.
      num_tasks: T.
      tx: optimizer of the method's parameters; None = Adam at 1e-3.

    Returns:
      An `Aggregator` with a `rule`. Its update needs `losses` [T]. Where these are not
      what the method allows, weights are NaN, so that no step is taken on them.

    Raises:
      ValueError: in the update, `losses` is missing.

    **Differs**: a method that needs the losses after a step gets them from the trainer,
      by `rule.after`. Where the rule is out of sight, as in an optax chain, `per_leaf`
      and `per_group`, it learns at the start of the next step, from the losses of the
      next batch. Norms are over all leaves that the aggregator acts on: give the
      trainer the shared ones, or the last of them; it weighs the others' losses too.

    >>> from mtl_jax import weighting
    >>> tx = as_aggregator(weighting.geometric_mean(), 2)
    >>> grads = {"w": jnp.array([[1.0], [1.0]])}
    >>> updates, _ = tx.update(grads, tx.init(None), losses=jnp.array([1.0, 4.0]))
    >>> updates["w"].tolist()
    [1.25]
    """
    tx = optax.adam(1e-3) if tx is None else tx
    looks_after = "after" in method.needs
    reads = ("gram", "losses") if "norms" in method.needs else ("losses",)

    def init():
        return _start(method, num_tasks, tx)

    def weigh(gram, state, *, losses=None, present=None, **extra):
        del extra
        if losses is None:
            raise ValueError("as_aggregator: the update needs `losses`, one per task")
        norms = jnp.sqrt(jnp.maximum(jnp.diag(gram), 0)).astype(jnp.float32)
        if present is None:
            # Norms are zeros where the Gramian is not formed.
            present = (losses != 0) | (norms != 0)
        if looks_after:
            state = _catch_up(method, state, losses, present)

        gradient = jax.grad(method.loss, argnums=(0, 1))
        weights, grads = gradient(losses, state.params, state.weighting, present)
        params, opt_state = descend(tx, grads, state.opt_state, state.params)
        found = method.update(
            state.weighting, losses, present, after=losses, norms=norms
        )
        new = state._replace(params=params, opt_state=opt_state, finite=found.finite)
        if looks_after:
            before = Before(losses.astype(jnp.float32), present, jnp.asarray(True))
            new = new._replace(before=before)
        else:
            new = new._replace(weighting=found)
        weights = jnp.where(found.finite, weights, jnp.nan)
        return weights.astype(jnp.float32), new

    def after(state, losses):
        return _learn(method, state, losses)

    def heads(losses, weights):
        del losses
        return weights

    rule = Rule(init, weigh, reads, after if looks_after else None)
    inner = from_gramian("as_aggregator", rule)

    def update(updates, state, params=None, **extra):
        found: tuple[Any, Any] = inner.update(updates, state, params, **extra)
        out, new = found
        return out, new._replace(finite=new.finite & new.method.finite)

    return Aggregator(inner.init, update, rule, heads=heads)


def _start(
    method: Weighting, num_tasks: int, tx: optax.GradientTransformation
) -> AsAggregatorState:
    """The state before the first step."""
    params, state = method.init(num_tasks)
    before = ()
    if "after" in method.needs:
        before = Before(
            losses=jnp.zeros(num_tasks, jnp.float32),
            present=jnp.zeros(num_tasks, bool),
            open=jnp.asarray(False),
        )
    return AsAggregatorState(
        params=params,
        opt_state=tx.init(params),
        weighting=state,
        before=before,
        finite=jnp.asarray(True),
    )


def _learn(
    method: Weighting, state: AsAggregatorState, after: chex.Array
) -> AsAggregatorState:
    """What the last step taught the method, from the losses after it."""
    losses, present, _ = state.before
    # Of a task that is absent, nothing is known after the step.
    after = jnp.where(present, after.astype(jnp.float32), losses)
    weighting = method.update(state.weighting, losses, present, after=after)
    before = state.before._replace(open=jnp.asarray(False))
    return state._replace(weighting=weighting, before=before)


def _catch_up(
    method: Weighting,
    state: AsAggregatorState,
    losses: chex.Array,
    present: chex.Array,
) -> AsAggregatorState:
    """Learns from a step after which nobody told the losses; those of now stand in."""
    # A task that is absent now says nothing about the step.
    after = jnp.where(present, losses.astype(jnp.float32), state.before.losses)
    return jax.lax.cond(
        state.before.open, lambda s: _learn(method, s, after), lambda s: s, state
    )
