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


class AsAggregatorState(NamedTuple):
    """State of a weighting that acts as an aggregator.

    Attributes:
      params: what the method learns.
      opt_state: of the optimizer of `params`.
      weighting: `WeightingState` of the method.
      losses: [T] float32 of the step before.
      norms: [T] float32, gradient norms of the step before.
      step: int32, steps taken.
      finite: bool, whether the last losses and norms were finite and what the method
        allows.
    """

    params: Any
    opt_state: Any
    weighting: WeightingState
    losses: chex.Array
    norms: chex.Array
    step: chex.Array
    finite: chex.Array


def as_aggregator(
    method: Weighting,
    num_tasks: int,
    *,
    tx: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Lets a method of losses stand where an aggregator of gradients is wanted.

    The update is the gradient of `method.loss`: task gradients weighed by its
    derivatives. What the method learns is trained by `tx` inside. A task whose loss and
    gradient are both zero counts as absent from the batch, with weight zero.

    Args:
      method: a weighting.
      num_tasks: T.
      tx: optimizer of the method's parameters; None = Adam at 1e-3.

    Returns:
      An `Aggregator` with a `rule`. Its update needs `losses` [T]. Where these are not
      what the method allows, weights are NaN, so that no step is taken on them.

    Raises:
      ValueError: in the update, `losses` is missing.

    **Differs**: `method.update` runs at the start of the next step, and what it sees as
      the losses `after` a step are those of the next batch.

    >>> from mtl_jax import weighting
    >>> tx = as_aggregator(weighting.geometric_mean(), 2)
    >>> grads = {"w": jnp.array([[1.0], [1.0]])}
    >>> updates, _ = tx.update(grads, tx.init(None), losses=jnp.array([1.0, 4.0]))
    >>> updates["w"].tolist()
    [1.25]
    """
    tx = optax.adam(1e-3) if tx is None else tx

    def init():
        params, state = method.init(num_tasks)
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return AsAggregatorState(
            params=params,
            opt_state=tx.init(params),
            weighting=state,
            losses=zeros,
            norms=zeros,
            step=jnp.int32(0),
            finite=jnp.asarray(True),
        )

    def weigh(gram, state, *, losses=None, **extra):
        del extra
        if losses is None:
            raise ValueError("as_aggregator: the update needs `losses`, one per task")

        norms = jnp.sqrt(jnp.maximum(jnp.diag(gram), 0)).astype(jnp.float32)
        present = _present(losses, norms)

        # Of a task that is absent now, nothing is known after the step.
        after = jnp.where(present, losses.astype(jnp.float32), state.losses)
        weighting = jax.lax.cond(
            state.step > 0,
            lambda old: _advance(method, old, after),
            lambda old: old.weighting,
            state,
        )
        gradient = jax.grad(method.loss, argnums=(0, 1))
        weights, grads = gradient(losses, state.params, weighting, present)
        params, opt_state = descend(tx, grads, state.opt_state, state.params)
        checked = method.update(weighting, losses, present, after=losses, norms=norms)
        weights = jnp.where(checked.finite, weights, jnp.nan)
        return weights.astype(jnp.float32), AsAggregatorState(
            params=params,
            opt_state=opt_state,
            weighting=weighting,
            losses=losses.astype(jnp.float32),
            norms=norms,
            step=state.step + 1,
            finite=checked.finite,
        )

    inner = from_gramian("as_aggregator", Rule(init, weigh))

    def update(updates, state, params=None, **extra):
        found: tuple[Any, Any] = inner.update(updates, state, params, **extra)
        out, new = found
        return out, new._replace(finite=new.finite & new.method.finite)

    return Aggregator(inner.init, update, inner.rule)


def _present(losses: chex.Array, norms: chex.Array) -> chex.Array:
    """Which tasks have an example in the batch, [T]."""
    return (losses != 0) | (norms != 0)


def _advance(method: Weighting, old: AsAggregatorState, after: chex.Array):
    """What the step before taught the method."""
    present = _present(old.losses, old.norms)
    return method.update(
        old.weighting, old.losses, present, after=after, norms=old.norms
    )
