"""Auto-Lambda, task weights that lower the validation loss one step ahead."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.transforms.aggregation._engines import LossFn, has_transpose, task_vjp
from mtl_jax.transforms.bilevel._base import (
    Bilevel,
    Rate,
    check_rate,
    descend,
    inner,
    move,
    rate_at,
    report,
    start,
)

_DERIVATIVES = ("auto", "difference", "exact")


def auto_lambda_hypergradient(
    loss_fn: LossFn,
    params: Any,
    weights: chex.Array,
    train_batch: Any,
    valid_batch: Any,
    *,
    learning_rate: chex.Array | float,
    primary: chex.Array | None = None,
    derivative: str = "auto",
) -> chex.Array:
    r"""Slope of the validation loss after one step, by the task weights.

      theta' = theta - a sum_t w_t dL_t(theta)
      d/dw_t  sum_p V_p(theta')  =  -a <dL_t(theta), sum_p dV_p(theta')>

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      params: theta, tree of floating point leaves.
      weights: w, [T].
      train_batch: for L.
      valid_batch: for V.
      learning_rate: a.
      primary: [T] float32, how much each task counts above; None = 1 each.
      derivative: "exact" takes the T inner products from the transposed backward pass,
        "difference" from two evaluations of the losses a hundredth to both sides along
        the validation gradient, "auto" the exact ones where the pass has a transpose.

    Returns:
      [T] float32.

    Raises:
      ValueError: an unknown derivative.

    **Follows**: Liu et al. 2022, "Auto-Lambda: Disentangling Dynamic Task
      Relationships".
    **Differs**: the paper has the difference; the exact form costs as much and has no
      step to choose. The look-ahead is plain SGD, without momentum and weight decay.

    >>> loss_fn = lambda w, x: jnp.stack([jnp.square(w - x) / 2, -w])
    >>> auto_lambda_hypergradient(
    ...     loss_fn, jnp.array(1.0), jnp.zeros(2), 0.0, 0.0, learning_rate=1.0
    ... ).tolist()
    [-0.0, 0.0]
    """
    name = "auto_lambda_hypergradient"
    if derivative not in _DERIVATIVES:
        known = ", ".join(_DERIVATIVES)
        raise ValueError(f"{name}: derivative is {derivative!r}, wanted one of {known}")
    losses, _, pullback = task_vjp(name, loss_fn, params, (train_batch,), False)
    ahead = descend(params, pullback(weights), learning_rate)
    valid, _, valid_pullback = task_vjp(name, loss_fn, ahead, (valid_batch,), False)
    ones = jnp.ones_like(valid)
    direction = valid_pullback(ones if primary is None else ones * primary)
    exact = derivative == "exact"
    if derivative == "auto":
        exact = has_transpose(pullback, losses)
    if exact:
        (slopes,) = jax.linear_transpose(pullback, losses)(direction)
    else:
        slopes = _central_difference(loss_fn, params, direction, train_batch)
    return -jnp.asarray(learning_rate, jnp.float32) * slopes.astype(jnp.float32)


def _central_difference(loss_fn, params, direction, batch):
    norm = jnp.sqrt(inner(direction, direction))
    # Both ends lie 0.01 from params; without a direction the slope is 0 anyway.
    size = 0.01 / jnp.where(norm > 0, norm, 1)
    above = loss_fn(descend(params, direction, -size), batch)
    below = loss_fn(descend(params, direction, size), batch)
    return (above - below).astype(jnp.float32) / (2 * size)


def auto_lambda(
    loss_fn: LossFn,
    *,
    inner_rate: Rate,
    tx: optax.GradientTransformation | None = None,
    primary: Sequence[int] | None = None,
    start_weight: float = 0.1,
    derivative: str = "auto",
) -> Bilevel:
    """Learns task weights by looking one step ahead on held-out data.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      inner_rate: learning rate of the model, or its schedule.
      tx: optimizer of the weights; None = Adam at 1e-4.
      primary: indices of the tasks that matter; None = all.
      start_weight: what every weight starts from.
      derivative: see `auto_lambda_hypergradient`.

    Returns:
      A `Bilevel`: its gradients are those of the weighted training losses, at the new
      weights. Weights are free numbers, as in the authors' code, not a softmax.

    Raises:
      ValueError: an unknown derivative, a rate that is not positive, a primary task
        that does not exist.

    **Follows**: Liu et al. 2022, "Auto-Lambda: Disentangling Dynamic Task
      Relationships".

    >>> loss_fn = lambda w, x: jnp.stack([jnp.square(w - x), jnp.square(w + 9)])
    >>> method = auto_lambda(loss_fn, inner_rate=0.1, primary=[0])
    >>> grads, state, info = method.update(jnp.array(1.0), method.init(2), 3.0, 3.0)
    >>> bool(info.weights[0] > 0.1 > info.weights[1])  # The second pulls away from 3.
    True
    """
    check_rate("auto_lambda", "inner_rate", inner_rate)
    tx = optax.adam(1e-4) if tx is None else tx

    def update(params, state, train_batch, valid_batch):
        rate = rate_at(inner_rate, state.step)
        hypergradient = auto_lambda_hypergradient(
            loss_fn,
            params,
            state.upper,
            train_batch,
            valid_batch,
            learning_rate=rate,
            primary=_mask(primary, state.upper.size),
            derivative=derivative,
        )
        state = move(tx, state, hypergradient)
        losses, _, pullback = task_vjp(
            "auto_lambda", loss_fn, params, (train_batch,), False
        )
        return (
            pullback(state.upper),
            state,
            report(losses, state.upper, hypergradient),
        )

    return Bilevel(
        init=lambda num_tasks: start("auto_lambda", num_tasks, start_weight, tx),
        update=update,
        weights=lambda state: state.upper,
    )


def _mask(primary: Sequence[int] | None, num_tasks: int) -> chex.Array | None:
    if primary is None:
        return None
    chosen = np.zeros(num_tasks, np.float32)
    for task in primary:
        if not 0 <= task < num_tasks:
            raise ValueError(f"auto_lambda: no primary task {task} among {num_tasks}")
        chosen[task] = 1
    return jnp.asarray(chosen)
