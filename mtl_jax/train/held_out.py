"""The gradient of a step by a method that learns task weights on held-out rows."""

from typing import Any

import chex
import jax

from mtl_jax.train.accumulate import join_batch, split_batch
from mtl_jax.train.state import TrainState, lenient_promotion
from mtl_jax.train.task_losses import TaskLosses, Values


def held_out_gradients(
    losses: TaskLosses, state: TrainState, batch: Any, key: chex.PRNGKey
) -> tuple[Values, Any, Any, chex.Array]:
    """Moves by one half of the batch, task weights by the other.

    The even rows are the training batch, the odd ones the held-out batch, so that no
    row leaves its device. Each half draws from a key of its own.

    Args:
      losses: of a trainable with a `bilevel.as_aggregator`.
      state: before the step.
      batch: an even number of rows.
      key: of the step.

    Returns:
      `((losses [T], metrics), grads, aggregator state, weights [T])`, the first of the
      training half.
    """
    parts = split_batch(batch, losses.mesh, 2)

    def half(at):
        rows = jax.tree.map(lambda x: x[at], parts)
        return join_batch(batch, rows), jax.random.fold_in(key, at)

    def loss_fn(params, each):
        return losses.at(params, state.frozen, *each)[0]

    inner, outer = half(0), half(1)
    aggregator: Any = losses.trainable.aggregator
    before = state.opt_state.aggregator
    with lenient_promotion():
        grads, method, info = aggregator.bilevel(loss_fn).update(
            state.params, before.method, inner, outer
        )
    # The forward pass of the update once more, for the metrics: compiled, it is one.
    values = losses.at(state.params, state.frozen, *inner)
    new = before._replace(method=method, finite=info.finite)
    return values, grads, new, info.weights
