"""GradVac, gradient surgery towards cosines remembered from earlier steps."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)
from mtl_jax.transforms.aggregation._cosine import cosine_gram
from mtl_jax.transforms.aggregation._pcgrad import random_orders, visit_tasks

_LARGEST_COSINE = 1 - 1e-4


class GradVacState(NamedTuple):
    """State of `grad_vac`.

    Attributes:
      key: typed PRNG key.
      targets: [T, T] float32, the moving average of the cosines that task i found at
        its visits to task j.
    """

    key: chex.PRNGKey
    targets: chex.Array


def vaccinate(
    gram: chex.Array, key: chex.PRNGKey, targets: chex.Array, beta: float
) -> tuple[chex.Array, chex.Array]:
    """Weights [T], and the new targets [T, T], which move by the share `beta`."""
    split = cosine_gram("grad_vac", gram)
    tasks = jnp.arange(len(split.norms))
    there = split.norms != 0
    goals = jnp.clip(targets, -_LARGEST_COSINE, _LARGEST_COSINE)

    def push(others, met, squares):
        length = jnp.sqrt(squares)
        cosine = jnp.where(length == 0, 0, met / jnp.where(length == 0, 1, length))
        cosine = jnp.clip(cosine, -1, 1)
        goal = goals[tasks, others]
        turn = jnp.sqrt((1 - cosine * cosine) / (1 - goal * goal))
        amounts = length * (goal * turn - cosine)
        # Without a gradient there is no direction to turn to.
        pushes = (cosine < goal) & jnp.take(there, others)
        return jnp.where(pushes, amounts, 0), cosine

    found, cosines = visit_tasks(split, random_orders(key, len(tasks)), push)
    met = there[:, None] & there[None, :] & ~jnp.eye(len(tasks), dtype=bool)
    return found, jnp.where(met, (1 - beta) * targets + beta * cosines, targets)


def weights(
    gram: chex.Array, key: chex.PRNGKey, targets: chex.Array | None = None
) -> chex.Array:
    r"""Weights of the sum of gradients turned towards target cosines.

    For each task i, visit the other tasks j in random order. Where the cosine p between
    the running gradient v and g_j is below the target t = targets[i, j], the multiple
    of g_j that brings it there is added:

      v <- v + |v| (t sqrt(1 - p^2) - p sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j.

    Args:
      gram: [T, T], inner products of task gradients.
      key: typed PRNG key; one independent order per task.
      targets: [T, T]; zeros, which is PCGrad, where not given.

    Returns:
      [T] float32.

    Raises:
      ValueError: `gram` is not square, or `targets` is not like it.

    **Follows**: Wang et al. 2021, "Gradient Vaccine", alg. 1 and eq. 3.
    **Differs**: targets stay 1e-4 away from -1 and 1, where the equation divides by
      zero; a zero gradient pushes nothing, is not pushed and moves no target.

    >>> gram = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> targets = jnp.full((2, 2), 0.6)
    >>> [round(x, 3) for x in weights(gram, jax.random.key(0), targets).tolist()]
    [1.75, 1.75]
    """
    gram = gram_of("grad_vac", gram)
    if targets is None:
        targets = jnp.zeros_like(gram)
    targets = jnp.asarray(targets)
    if targets.shape != gram.shape:
        raise ValueError(f"grad_vac: targets are {targets.shape}, wanted {gram.shape}")
    return vaccinate(gram, key, targets.astype(gram.dtype), 0.0)[0]


def grad_vac(num_tasks: int, *, beta: float = 0.5, seed: int = 0) -> Aggregator:
    """Aggregates by GradVac; see `weights.grad_vac`.

    Updates: leaves [T, ...] -> [...]. State: `GradVacState`; targets start at zero and
    move after every visit between gradients that are there, `t <- (1 - beta) t + beta
    p`.

    Args:
      num_tasks: T.
      beta: weight of the newest cosine, in [0, 1].
      seed: of the random orders.

    Raises:
      ValueError: `beta` is outside [0, 1]; in updates, there are not `num_tasks` tasks.

    **Follows**: Wang et al. 2021, alg. 1: the average moves at every visit. LibMTL
      moves it only where it pushed.

    >>> tx = grad_vac(2)
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.8, 1.4]
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"grad_vac: beta is {beta}, wanted a number in [0, 1]")

    def init():
        zeros = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return GradVacState(key=jax.random.key(seed), targets=zeros)

    def weigh(gram, state, **extra):
        del extra
        gram = gram_of("grad_vac", gram)
        if gram.shape[0] != num_tasks:
            raise ValueError(
                f"grad_vac: there are {gram.shape[0]} tasks, wanted {num_tasks}"
            )
        key, use = jax.random.split(state.key)
        targets = state.targets.astype(gram.dtype)
        found, targets = vaccinate(gram, use, targets, beta)
        targets = targets.astype(state.targets.dtype)
        return found, GradVacState(key=key, targets=targets)

    return from_gramian("grad_vac", Rule(init, weigh))
