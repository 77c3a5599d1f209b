"""Learning what a merge depends on, by descent on losses of the merged model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree


class Learned(NamedTuple):
    """Where learning arrived.

    Attributes:
      variables: what was learned, in the structure that it started from.
      state: optimizer state, to go on from.
      losses: [S, T] float32, of every step before its update, by task.
    """

    variables: Any
    state: Any
    losses: jax.Array


def learner(
    params_fn: Callable[[Any, Any], Any],
    loss_fn: Callable[[Any, Any, Any, Any], Any],
    tx: optax.GradientTransformation,
    *,
    penalty: Callable[[Any], Any] | None = None,
) -> Callable[..., Learned]:
    r"""Makes a compiled loop that learns the variables of a merge.

      theta = params_fn(variables, args)
      L     = sum_t loss_fn(theta, batch_t, task_t, args) + penalty(variables)

    A step merges once, walks over the tasks with one gradient in memory, adds up the
    slopes along the parameters and pulls them back to the variables once: for
    coefficients of task vectors that is `coefficient_grads`. All steps run in one
    `lax.scan`; nothing compiles again for another task or for more steps of the same
    number at a time.

    Args:
      params_fn: `params_fn(variables, args) -> params`, such as `compose`.
      loss_fn: `loss_fn(params, batch, task, args) -> scalar`, of one task.
      tx: of the variables.
      penalty: `penalty(variables) -> scalar`.

    Returns:
      `run(variables, batches, tasks=None, args=None, state=None) -> Learned`: batches
      have leaves [S, T, ...], one step of one task each; tasks have leaves [T, ...],
      what differs between tasks and stays, such as heads; args are any arrays that both
      functions take (arrays that they close over become constants of the compiled
      loop); state is that of a run before, to go on.

    Follows: the loop of Yang et al. 2024, "AdaMerging", whose loss is the sum over
      tasks of the mean entropy of a batch.

    >>> def params_fn(variables, args):
    ...     return {"w": args + variables}
    >>> def loss_fn(params, batch, task, args):
    ...     return jnp.sum((params["w"] - batch) ** 2)
    >>> run = learner(params_fn, loss_fn, optax.sgd(0.1))
    >>> found = run(jnp.zeros(()), jnp.full((50, 2), 3.0), args=jnp.ones(()))
    >>> float(found.variables.round(3)), found.losses.shape
    (2.0, (50, 2))
    """

    def step(variables, state, batch, tasks, args):
        losses, grads = slopes(params_fn, loss_fn, variables, batch, tasks, args)
        if penalty is not None:
            grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(variables))
        return *descend(tx, grads, state, variables), losses

    @jax.jit
    def loop(variables, state, batches, tasks, args):
        def body(carry, batch):
            variables, state, losses = step(carry[0], carry[1], batch, tasks, args)
            return (variables, state), losses

        carry, losses = jax.lax.scan(body, (variables, state), batches)
        return Learned(*carry, losses)

    def run(variables, batches, tasks=None, args=None, state=None) -> Learned:
        state = tx.init(variables) if state is None else state
        return loop(variables, state, batches, tasks, args)

    return run


def slopes(
    params_fn: Callable[[Any, Any], Any],
    loss_fn: Callable[[Any, Any, Any, Any], Any],
    variables: Any,
    batch: Any,
    tasks: Any,
    args: Any,
) -> tuple[jax.Array, Any]:
    """Losses of the tasks [T], and the slopes of their sum along the variables.

    Merges once, walks over the tasks with one gradient in memory, and pulls their sum
    back once. Arguments as in `learner`; batch and tasks have leaves [T, ...].
    """
    params, rest, pull, join = _opened(params_fn, variables, args)

    def one(total, item):
        def loss(params):
            return loss_fn(join(params, rest), item[0], item[1], args)

        value, grads = jax.value_and_grad(loss)(params)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return total, value.astype(jnp.float32)

    total, losses = jax.lax.scan(
        one,
        jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_dtype(x.dtype)), params),
        (batch, tasks),
    )
    total = jax.tree.map(lambda t, x: t.astype(x.dtype), total, params)
    return losses, pull(total)[0]


def descend(
    tx: optax.GradientTransformation, grads: Any, state: Any, variables: Any
) -> tuple[Any, Any]:
    """One step of an optimizer: (variables, state)."""
    # Optimizers of optax mix kinds of numbers.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = tx.update(grads, state, variables)
    return optax.apply_updates(variables, updates), state


def _opened(params_fn, variables, args):
    """Floating leaves of the merged model, the others, the way back, and the join."""
    treedef: Any = None

    def floats(variables):
        nonlocal treedef
        leaves, treedef = jax.tree.flatten(params_fn(variables, args))
        move = [tree.is_inexact(x) for x in leaves]
        return (
            [x if m else None for x, m in zip(leaves, move, strict=True)],
            [None if m else x for x, m in zip(leaves, move, strict=True)],
        )

    params, pull, rest = jax.vjp(floats, variables, has_aux=True)

    def join(params, rest):
        pairs = zip(params, rest, strict=True)
        return treedef.unflatten([r if p is None else p for p, r in pairs])

    return params, rest, pull, join
