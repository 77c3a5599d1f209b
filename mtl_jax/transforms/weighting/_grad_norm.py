"""GradNorm, weights that make gradient norms follow the training rates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.weighting._base import (
    Weighting,
    descend,
    from_loss,
    masked_mean,
    masked_sum,
    numbers,
    per_task,
)


class GradNormState(NamedTuple):
    """State of GradNorm.

    Attributes:
      logits: [T] float32; the weights are `T softmax(logits)`.
      first: [T] float32, the losses that training rates refer to; 0 = not seen yet.
      opt_state: of the optimizer of the logits.
    """

    logits: chex.Array
    first: chex.Array
    opt_state: Any


def grad_norm(
    *,
    alpha: float = 1.5,
    learning_rate: float = 0.025,
    first_losses: Sequence[float] | None = None,
) -> Weighting:
    r"""Weighs tasks so that slow ones have the larger gradients.

      w = T softmax(v),   r_t = (L_t / first_t) / mean_j (L_j / first_j),
      v minimises sum_t |w_t n_t - mean_j(w_j n_j) r_t^alpha|, the target held constant,

    where n_t is the norm of the gradient of task t at the last shared layer.

    Args:
      alpha: how strongly training rates are pulled together; 0 = equal norms.
      learning_rate: of the Adam that moves v.
      first_losses: [T], what losses are compared with; None = those of the first
        update.

    Returns:
      A `Weighting` with a `GradNormState`; `update` needs `norms`, [T]. Losses must be
      positive.

    Raises:
      ValueError: the first losses are not one finite number per task; in `update`,
        `norms` is missing.

    **Follows**: Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss
      Balancing in Deep Multitask Networks".
    **Differs**: the weights are T times a softmax, as in LibMTL, so that they stay
      positive and sum to T; the paper renormalises free weights after every step.

    >>> method = grad_norm(alpha=0.0)
    >>> params, state = method.init(2)
    >>> state = method.update(state, jnp.ones(2), norms=jnp.array([2.0, 1.0]))
    >>> weights = method.weights([1.0, 1.0], params, state)
    >>> bool(weights[0] < 1 < weights[1])
    True
    """
    given = None
    if first_losses is not None:
        given = numbers("grad_norm", "first_losses", first_losses)
    tx = optax.adam(learning_rate)

    def weights(logits):
        return logits.size * jax.nn.softmax(logits)

    def init(num_tasks):
        logits = jnp.zeros(num_tasks, jnp.float32)
        first = jnp.zeros(num_tasks, jnp.float32)
        if given is not None:
            first = per_task("grad_norm", "first_losses", given, logits.shape)
        return {}, GradNormState(logits, first, tx.init(logits))

    def loss(losses, params, state, present):
        del params
        w = per_task("grad_norm", "logits", weights(state.logits), losses.shape)
        return masked_sum(w * losses, present)

    def update(state, losses, present, *, norms=None, **extra):
        del extra
        if norms is None:
            raise ValueError(
                "grad_norm: update needs `norms`, the norms of the task gradients"
            )
        norms = per_task("grad_norm", "norms", norms, losses.shape)
        norms = jnp.where(present, norms, 0)
        losses = losses.astype(jnp.float32)
        first = jnp.where((state.first == 0) & present, losses, state.first)
        ratio = losses / jnp.where(first == 0, 1, first)
        mean = masked_mean(ratio, present)
        rate = (ratio / jnp.where(mean == 0, 1, mean)) ** alpha  # 0: none is present.

        def distance(logits):
            scaled = weights(logits) * norms
            target = jax.lax.stop_gradient(masked_mean(scaled, present) * rate)
            return masked_sum(jnp.abs(scaled - target), present)

        gradient = jax.grad(distance)(state.logits)
        logits, opt_state = descend(tx, gradient, state.opt_state, state.logits)
        return GradNormState(logits, first, opt_state)

    return from_loss(
        "grad_norm", loss, init=init, update=update, lower=0.0, needs=("norms",)
    )
