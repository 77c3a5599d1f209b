"""SDMGrad, min-norm weights pulled towards a preferred direction, from two batches."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)
from mtl_jax.transforms.aggregation._cosine import dot, preference_of
from mtl_jax.transforms.aggregation._extra import extra_of
from mtl_jax.transforms.aggregation._present import present_of, project_present


def weights(
    cross_gram: chex.Array,
    last: chex.Array | None = None,
    *,
    regularization: float = 0.3,
    preference: Any = None,
    learning_rate: float = 10.0,
    momentum: float = 0.5,
    steps: int = 20,
    present: chex.Array | None = None,
) -> chex.Array:
    r"""Weights `(w + c p) / (1 + c)` after some projected steps of w.

    With `A = J1 J2^T / (mean sqrt diag)^2`, w follows the gradient `A (w + c p)` of the
    squared length of the update, with momentum, and is projected onto the simplex.

    Args:
      cross_gram: [T, T], `J1 J2^T`, inner products between the task gradients of two
        batches; see `cross_gram`.
      last: [T], w of the last step; 1 / T each where None.
      regularization: c, 0 or more.
      preference: [T], p; 1 / T each where None.
      learning_rate: of the steps of w.
      momentum: of the steps of w, heavy ball.
      steps: how many.
      present: bool [T], the tasks that there are; others keep their w. All by default.

    Returns:
      [T] float32.

    Raises:
      ValueError: `cross_gram` is not square, or `preference` is not [T].

    **Follows**: Xiao et al. 2023, "Direction-oriented Multi-objective Learning: Simple
      and Provable Stochastic Algorithms", alg. 1.
    **Differs**: the division by the mean diagonal, and momentum, are those of the
      authors' code; without gradients (all on the diagonal 0 or less) nothing is
      divided.

    >>> found = weights(jnp.diag(jnp.array([3.0, 1.0])), learning_rate=0.1)
    >>> print(*(f"{x:.2f}" for x in found))
    0.25 0.75
    """
    options = (regularization, preference, learning_rate, momentum, steps)
    return _solve(cross_gram, last, present, *options)[0]


def _solve(
    cross_gram,
    last,
    present,
    regularization,
    preference,
    learning_rate,
    momentum,
    steps,
):
    gram = gram_of("sdm_grad", cross_gram)
    count = len(gram)
    if present is not None:
        present = present_of("sdm_grad", present, count)
    equal = jnp.full(count, 1 / count, gram.dtype)
    wanted = equal
    if preference is not None:
        wanted = preference_of("sdm_grad", preference, count, gram.dtype)
    roots, counted = jnp.sqrt(jnp.maximum(jnp.diag(gram), 0)), count
    if present is not None:
        roots, counted = jnp.where(present, roots, 0), jnp.maximum(jnp.sum(present), 1)
    root = jnp.sum(roots) / jnp.asarray(counted, gram.dtype)
    scaled = gram / jnp.where(root == 0, 1, root) / jnp.where(root == 0, 1, root)

    def step(_, carry):
        w, velocity = carry
        slope = dot(scaled, w + regularization * wanted)
        velocity = momentum * velocity + slope
        moved = w - learning_rate * velocity
        return project_present(moved, start, present), velocity

    start = equal if last is None else jnp.asarray(last).astype(gram.dtype)
    w, _ = jax.lax.fori_loop(0, steps, step, (start, jnp.zeros_like(start)))
    return (w + regularization * wanted) / (1 + regularization), w


def sdm_grad(
    num_tasks: int,
    *,
    regularization: float = 0.3,
    preference: Any = None,
    learning_rate: float = 10.0,
    momentum: float = 0.5,
    steps: int = 20,
) -> Aggregator:
    """Aggregates by SDMGrad; see `weights.sdm_grad`. Needs the extra `cross_gram`.

    Updates: leaves [T, ...] -> [...]. State: w [T], from where the next steps start.
    Takes `present` bool [T] where a batch may lack tasks.

    Args:
      num_tasks: T.
      regularization: pull towards the preferred direction, 0 or more.
      preference: [T]; 1 / T each where None.
      learning_rate: of the steps of w.
      momentum: of the steps of w.
      steps: how many.

    **Differs**: the paper takes a third batch for the gradients; the trainer compares
      two halves of one batch, and combines their averages.

    >>> tx = sdm_grad(2, learning_rate=0.1)
    >>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.eye(2)}
    >>> cross = jnp.diag(jnp.array([3.0, 1.0]))
    >>> out, _ = tx.update(grads, tx.init(params), cross_gram=cross)
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    0.25 0.75
    """
    options = (regularization, preference, learning_rate, momentum, steps)

    def init():
        return jnp.full(num_tasks, 1 / num_tasks, jnp.float32)

    def weigh(gram, last, *, present=None, **extra):
        del gram
        cross = extra_of("sdm_grad", extra, "cross_gram", (num_tasks, num_tasks))
        return _solve(cross, last, present, *options)

    return from_gramian("sdm_grad", Rule(init, weigh, reads=("cross_gram",)))
