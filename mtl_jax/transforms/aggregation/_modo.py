"""MoDo, min-norm weights followed from step to step with two independent batches."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)
from mtl_jax.transforms.aggregation._cosine import dot
from mtl_jax.transforms.aggregation._extra import extra_of
from mtl_jax.transforms.aggregation._present import present_of, project_present


def weights(
    cross_gram: chex.Array,
    last: chex.Array | None = None,
    *,
    gamma: float = 0.1,
    rho: float = 0.1,
    present: chex.Array | None = None,
) -> chex.Array:
    r"""One projected step of the weights, `P(l - gamma (J1 J2^T l + rho l))`.

    Args:
      cross_gram: [T, T], `J1 J2^T`, inner products between the task gradients of two
        batches; see `cross_gram`.
      last: [T], l, the weights of the last step; 1 / T each where None.
      gamma: step size, for gradients as they are: there is no normalisation.
      rho: strength of the pull towards equal weights.
      present: bool [T], the tasks that there are; others keep their weights. All by
        default.

    Returns:
      [T] float32, non-negative, of sum one.

    Raises:
      ValueError: `cross_gram` is not square.

    **Follows**: Chen et al. 2023, "Three-Way Trade-Off in Multi-Objective Learning:
      Optimization, Generalization and Conflict-Avoidance", alg. 1.

    >>> found = weights(jnp.diag(jnp.array([3.0, 1.0])))
    >>> print(*(f"{x:.2f}" for x in found))
    0.45 0.55
    """
    gram = gram_of("modo", cross_gram)
    count = len(gram)
    last = jnp.full(count, 1 / count) if last is None else jnp.asarray(last)
    last = last.astype(gram.dtype)
    if present is not None:
        present = present_of("modo", present, count)
    moved = last - gamma * (dot(gram, last) + rho * last)
    return project_present(moved, last, present)


def modo(num_tasks: int, *, gamma: float = 0.1, rho: float = 0.1) -> Aggregator:
    """Aggregates by MoDo; see `weights.modo`. Needs the extra argument `cross_gram`.

    Updates: leaves [T, ...] -> [...]. State: the weights [T]. Takes `present` bool [T]
    where a batch may lack tasks.

    Args:
      num_tasks: T.
      gamma: step size of the weights.
      rho: strength of the pull towards equal weights.

    **Differs**: the paper takes a third batch for the gradients; the trainer compares
      two halves of one batch, and combines their averages.

    >>> tx = modo(2)
    >>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.eye(2)}
    >>> cross = jnp.diag(jnp.array([3.0, 1.0]))
    >>> out, _ = tx.update(grads, tx.init(params), cross_gram=cross)
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    0.45 0.55
    """

    def init():
        return jnp.full(num_tasks, 1 / num_tasks, jnp.float32)

    def weigh(gram, last, *, present=None, **extra):
        del gram
        cross = extra_of("modo", extra, "cross_gram", (num_tasks, num_tasks))
        found = weights(cross, last, gamma=gamma, rho=rho, present=present)
        return found, found

    return from_gramian("modo", Rule(init, weigh, reads=("cross_gram",)))
