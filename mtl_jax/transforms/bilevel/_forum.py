"""FORUM, bilevel weights with first derivatives only."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree
from mtl_jax.transforms.aggregation._cosine import dot
from mtl_jax.transforms.aggregation._engines import LossFn, task_rows, task_vjp
from mtl_jax.transforms.aggregation._solvers import project_simplex
from mtl_jax.transforms.bilevel._base import (
    Bilevel,
    Rate,
    check_rate,
    inner,
    move,
    rate_at,
    report,
    sgd_path,
    start,
)

_ITERATIONS = 300
_SETTLED = 1e-7  # a step on the simplex that rounding explains


class ForumWeights(NamedTuple):
    """Multipliers of one step.

    Attributes:
      tasks: [T] float32 on the simplex, of the validation gradients.
      constraint: float32, 0 or more, of the gradient of the constraint.
    """

    tasks: chex.Array
    constraint: chex.Array


def forum_weights(
    gram: chex.Array, cross: chex.Array, square: chex.Array, *, phi: float = 0.1
) -> ForumWeights:
    r"""Multipliers of the direction that lowers all objectives and the constraint.

    The direction d of least `max_t <F_t, d> + |d|^2 / 2` with `<q, d> <= -phi |q|^2`
    is `-(sum_t l_t F_t + nu q)`, where over the simplex

      l = argmin  1/2 |sum_t l_t F_t + nu q|^2 - nu phi |q|^2,
      nu = max(0, sum_t l_t p_t),   p_t = phi - <q, F_t> / |q|^2.

    Args:
      gram: [T, T], inner products of the objectives' gradients F.
      cross: [T], `<q, F_t>`, q being the gradient of the constraint.
      square: `|q|^2`.
      phi: how fast the constraint has to fall.

    Returns:
      `ForumWeights`. By accelerated projected gradients, 300 steps at most.

    **Follows**: Ye et al. 2024, "A First-Order Multi-Gradient Algorithm for Multi-
      Objective Bi-Level Optimization".
    **Differs**: LibMTL leaves out the 1/2 of the dual, which moves l.

    >>> found = forum_weights(jnp.eye(2), jnp.zeros(2), jnp.array(4.0), phi=0.5)
    >>> [round(float(x), 3) for x in found.tasks], round(float(found.constraint), 3)
    ([0.5, 0.5], 0.5)
    """
    some = square > 0
    along = jnp.where(some, cross / jnp.where(some, square, 1), 0)
    slack = phi - along

    def slope(tasks):
        multiplier = jnp.maximum(dot(slack, tasks), 0)
        return dot(gram, tasks) - square * multiplier * slack

    # On the simplex the curvature is at most that of the Gramian.
    bound = jnp.max(jnp.sum(jnp.abs(gram), 1))
    rate = 1 / jnp.where(bound > 0, bound, 1)

    def step(carry):
        tasks, ahead, momentum, _, count = carry
        found = project_simplex(ahead - rate * slope(ahead))
        uphill = dot(ahead - found, found - tasks) > 0
        momentum = jnp.where(uphill, 1.0, momentum)
        following = (1 + jnp.sqrt(1 + 4 * momentum * momentum)) / 2
        rest = jnp.max(jnp.abs(found - ahead))
        ahead = found + (momentum - 1) / following * (found - tasks)
        return found, ahead, following, rest, count + 1

    def moving(carry):
        return (carry[3] > _SETTLED) & (carry[4] < _ITERATIONS)

    first = jnp.full(gram.shape[0], 1 / gram.shape[0], gram.dtype)
    one = jnp.ones((), gram.dtype)
    tasks = jax.lax.while_loop(moving, step, (first, first, one, one, 0))[0]
    return ForumWeights(tasks, forum_multiplier(tasks, cross, square, phi=phi))


def forum_multiplier(
    tasks: chex.Array, cross: chex.Array, square: chex.Array, *, phi: float
) -> chex.Array:
    """`nu` of `forum_weights` for given weights of the tasks; 0 without a constraint.

    >>> float(forum_multiplier(jnp.ones(1), jnp.ones(1), jnp.array(2.0), phi=0.75))
    0.25
    """
    some = square > 0
    slack = phi - cross / jnp.where(some, square, 1)
    return jnp.where(some, jnp.maximum(dot(slack, tasks), 0), 0)


def forum(
    loss_fn: LossFn,
    *,
    inner_rate: Rate = 0.1,
    inner_steps: int = 5,
    phi: float = 0.1,
    tx: optax.GradientTransformation | None = None,
) -> Bilevel:
    r"""Learns task weights by treating the training problem as a constraint.

    The weighted training loss `f(x, theta) = sum_t softmax(x)_t L_t(theta)` may exceed
    what a few inner steps reach, `q(x, theta) = f(x, theta) - f(x, theta_K)`, less and
    less, while all validation losses fall: see `forum_weights`. theta_K counts as a
    constant, so no second derivative is taken. The weights of the tasks are averaged
    over steps, step k counting `(k + 1)^(-3/4)`.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      inner_rate: learning rate of the inner steps, or its schedule.
      inner_steps: K.
      phi: how fast the constraint has to fall.
      tx: optimizer of the logits x; None = Adam at 1e-3.

    Returns:
      A `Bilevel`: its gradients for the model are those of the combined direction, not
      of the weighted training loss. `BilevelState.method` is the average, [T].

    Raises:
      ValueError: a rate or `phi` that is not positive, or no inner step.

    **Follows**: Ye et al. 2024, "A First-Order Multi-Gradient Algorithm for Multi-
      Objective Bi-Level Optimization"; validation gradients at length one as in LibMTL.
    **Differs**: the average is over steps, in LibMTL over epochs; see `forum_weights`.

    >>> loss_fn = lambda w, x: jnp.stack([jnp.square(w - x), jnp.square(w - 2 * x)])
    >>> method = forum(loss_fn, inner_steps=2)
    >>> grads, state, info = method.update(jnp.array(0.0), method.init(2), 1.0, 1.0)
    >>> bool(grads < 0), bool(info.finite)
    (True, True)
    """
    check_rate("forum", "inner_rate", inner_rate)
    check_rate("forum", "phi", phi)
    if inner_steps < 1:
        raise ValueError(f"forum: inner_steps is {inner_steps}, wanted 1 or more")
    tx = optax.adam(1e-3) if tx is None else tx

    def init(num_tasks):
        first = start("forum", num_tasks, 0.0, tx)
        return first._replace(method=jnp.zeros(num_tasks, jnp.float32))

    def update(params, state, train_batch, valid_batch):
        now = jax.nn.softmax(state.upper)
        losses, _, pullback = task_vjp("forum", loss_fn, params, (train_batch,), False)
        rate = rate_at(inner_rate, state.step)
        reached = jax.lax.stop_gradient(
            sgd_path(
                loss_fn, params, now, train_batch, learning_rate=rate, steps=inner_steps
            )
        )
        gap = (losses - loss_fn(reached, train_batch)).astype(jnp.float32)
        q_upper = now * (gap - dot(now, gap))
        q_lower = pullback(now)
        rows = _unit_rows(loss_fn, params, valid_batch)
        cross = jax.vmap(lambda row: inner(row, q_lower))(rows)
        square = inner(q_lower, q_lower) + dot(q_upper, q_upper)
        found = forum_weights(tree.gram(rows), cross, square, phi=phi)
        share = (state.step.astype(jnp.float32) + 1) ** -0.75
        tasks = state.method + share * (found.tasks - state.method)
        nu = forum_multiplier(tasks, cross, square, phi=phi)
        grads = jax.tree.map(
            lambda f, q: (f.astype(jnp.float32) + nu * q.astype(jnp.float32)).astype(
                q.dtype
            ),
            tree.combine(rows, tasks),
            q_lower,
        )
        hypergradient = nu * q_upper
        state = move(tx, state, hypergradient)._replace(method=tasks)
        info = report(losses, jax.nn.softmax(state.upper), hypergradient)
        return grads, state, info

    return Bilevel(init, update, lambda state: jax.nn.softmax(state.upper))


def _unit_rows(loss_fn: LossFn, params: Any, batch: Any) -> Any:
    """Task gradients at length one; zero ones stay zero."""
    losses, _, pullback = task_vjp("forum", loss_fn, params, (batch,), False)
    rows = task_rows(pullback, losses)
    squares = jnp.diag(tree.gram(rows))
    inverse = jnp.where(
        squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0
    )

    def leaf(x):
        scale = inverse.reshape((-1,) + (1,) * (x.ndim - 1))
        return (x.astype(jnp.float32) * scale).astype(x.dtype)

    return jax.tree.map(leaf, rows)
