"""MOML, task weights that lower every validation loss at once."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.aggregation._engines import LossFn, task_rows, task_vjp
from mtl_jax.transforms.aggregation._solvers import min_norm_point
from mtl_jax.transforms.bilevel._base import (
    Bilevel,
    Rate,
    check_rate,
    move,
    rate_at,
    report,
    sgd_path,
    start,
)


def moml_hypergradients(
    loss_fn: LossFn,
    params: Any,
    logits: chex.Array,
    train_batch: Any,
    valid_batch: Any,
    *,
    learning_rate: chex.Array | float,
    steps: int = 1,
) -> chex.Array:
    r"""Slopes of every validation loss after a few steps, by the logits of the weights.

      theta_K(x): K steps of SGD on sum_t softmax(x)_t L_t from theta
      H[p, t] = d V_p(theta_K(x)) / d x_t

    Exact, by differentiating through the steps.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      params: theta, tree of floating point leaves.
      logits: x, [T].
      train_batch: for L.
      valid_batch: for V.
      learning_rate: of the inner steps.
      steps: K, 1 or more.

    Returns:
      H, [T, T] float32.

    **Follows**: Ye et al. 2021, "Multi-Objective Meta Learning", alg. 1.

    >>> loss_fn = lambda w, x: jnp.stack([w * x, 2 * w])
    >>> moml_hypergradients(
    ...     loss_fn, jnp.array(0.0), jnp.zeros(2), 1.0, 1.0, learning_rate=1.0
    ... ).tolist()
    [[0.25, -0.25], [0.5, -0.5]]
    """

    def outcome(logits):
        ahead = sgd_path(
            loss_fn,
            params,
            jax.nn.softmax(logits),
            train_batch,
            learning_rate=learning_rate,
            steps=steps,
        )
        return loss_fn(ahead, valid_batch)

    losses, _, pullback = task_vjp("moml_hypergradients", outcome, logits, (), False)
    return task_rows(pullback, losses).astype(jnp.float32)


def moml(
    loss_fn: LossFn,
    *,
    inner_rate: Rate = 0.1,
    inner_steps: int = 1,
    tx: optax.GradientTransformation | None = None,
) -> Bilevel:
    """Learns task weights by multi-objective descent on the validation losses.

    The rows of `moml_hypergradients`, at length one each, are combined by the
    shortest vector of their convex hull.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      inner_rate: learning rate of the inner steps, or its schedule.
      inner_steps: how many.
      tx: optimizer of the logits; None = Adam at 1e-3.

    Returns:
      A `Bilevel`: its gradients are those of the weighted training losses, at the new
      weights, a softmax.

    Raises:
      ValueError: a rate that is not positive, or no inner step.

    **Follows**: Ye et al. 2021, "Multi-Objective Meta Learning", alg. 1; rows at length
      one as in LibMTL.

    >>> loss_fn = lambda w, x: jnp.stack([jnp.square(w - x), jnp.square(w - x) / 9])
    >>> method = moml(loss_fn)
    >>> grads, state, info = method.update(jnp.array(0.0), method.init(2), 1.0, 1.0)
    >>> bool(info.weights[0] > info.weights[1])  # The faster of two that agree.
    True
    """
    check_rate("moml", "inner_rate", inner_rate)
    if inner_steps < 1:
        raise ValueError(f"moml: inner_steps is {inner_steps}, wanted 1 or more")
    tx = optax.adam(1e-3) if tx is None else tx

    def update(params, state, train_batch, valid_batch):
        rows = moml_hypergradients(
            loss_fn,
            params,
            state.upper,
            train_batch,
            valid_batch,
            learning_rate=rate_at(inner_rate, state.step),
            steps=inner_steps,
        )
        hypergradient = common_descent(rows)
        state = move(tx, state, hypergradient)
        losses, _, pullback = task_vjp("moml", loss_fn, params, (train_batch,), False)
        weights = jax.nn.softmax(state.upper)
        return pullback(weights), state, report(losses, weights, hypergradient)

    return Bilevel(
        init=lambda num_tasks: start("moml", num_tasks, 0.0, tx),
        update=update,
        weights=lambda state: jax.nn.softmax(state.upper),
    )


def common_descent(rows: chex.Array) -> chex.Array:
    """Shortest convex combination of the rows at length one; [T, D] -> [D]."""
    largest = jnp.max(jnp.abs(rows), 1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(rows * rows, 1, keepdims=True))
    rows = rows / jnp.where(length > 0, length, 1)
    gram = jnp.matmul(rows, rows.T, precision="highest")
    return jnp.matmul(min_norm_point(gram), rows, precision="highest")
