"""MGDA, the shortest vector among the convex combinations of the gradients."""

from typing import Literal, get_args

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation import _solvers
from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)
from mtl_jax.transforms.aggregation._cosine import cosine_gram
from mtl_jax.transforms.aggregation._present import present_of, stand_ins

Normalize = Literal["none", "l2", "loss", "loss_l2"]
_SMALLEST_LOSS = 1e-6  # of the largest, in size


def weights(
    gram: chex.Array,
    losses: chex.Array | None = None,
    *,
    normalize: Normalize = "none",
    present: chex.Array | None = None,
) -> chex.Array:
    r"""Weights of the shortest convex combination of the task gradients.

      min_w |sum_t w[t] g_t / s_t|^2   such that   w >= 0, sum w = 1

    with s_t = 1 ("none"), |g_t| ("l2"), L_t ("loss") or L_t |g_t| ("loss_l2").

    Args:
      gram: [T, T], inner products of task gradients.
      losses: [T], positive; needed for "loss" and "loss_l2".
      normalize: by what the gradients are divided before the problem is solved.
      present: bool [T], the tasks that there are; others get no weight. All by default.

    Returns:
      [T] float32, non-negative, sum 1: the weights of the gradients as they came.
      Where the gradient of a task that is present is zero, all the weight is there.

    Raises:
      ValueError: `gram` is not square, `normalize` is unknown, losses are missing or do
        not fit.

    **Follows**: Desideri 2012, "Multiple-gradient descent algorithm", and Sener, Koltun
      2018, "Multi-Task Learning as Multi-Objective Optimization", eq. 3; their code
      normalises as here and weighs the gradients as they came.
    **Differs**: solved exactly; Sener and Koltun, LibMTL and TorchJD stop an iteration
      early. LibMTL weighs the divided gradients. Losses below 1e-6 of the largest,
      negative ones too, count as that.

    >>> [round(x, 3) for x in weights(jnp.array([[1.0, 0.0], [0.0, 3.0]])).tolist()]
    [0.75, 0.25]
    """
    gram = gram_of("mgda", gram)
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"mgda: normalize is {normalize!r}, wanted one of {get_args(Normalize)}"
        )
    place = None
    if present is not None:
        place = stand_ins(present_of("mgda", present, len(gram)))
        gram = gram[place[:, None], place[None, :]]
    if normalize in ("l2", "loss_l2"):
        gram = cosine_gram("mgda", gram).cosines
    if normalize in ("loss", "loss_l2"):
        if losses is None:
            raise ValueError(f"mgda: losses are missing, normalize={normalize!r} needs")
        losses = jnp.asarray(losses)
        if losses.shape != gram.shape[:1]:
            raise ValueError(
                f"mgda: losses are {losses.shape}, wanted {gram.shape[:1]}"
            )
        losses = losses.astype(gram.dtype)
        losses = losses if place is None else jnp.take(losses, place)
        largest = jnp.max(jnp.abs(losses))
        sizes = jnp.maximum(losses, _SMALLEST_LOSS * largest)
        sizes = jnp.where(largest == 0, 1, sizes / jnp.where(largest == 0, 1, largest))
        gram = gram / sizes[:, None] / sizes[None, :]
    found = _solvers.min_norm_point(gram)
    return found if place is None else jnp.zeros_like(found).at[place].add(found)


def mgda(*, normalize: Normalize = "none") -> Aggregator:
    """Aggregates by MGDA; see `weights.mgda`.

    Updates: leaves [T, ...] -> [...]. Takes `losses` [T] with "loss" and "loss_l2", and
    `present` bool [T] where a batch may lack tasks.

    Args:
      normalize: "none", "l2", "loss" or "loss_l2".

    Raises:
      ValueError: `normalize` is unknown; in updates, losses are needed and missing.

    >>> tx = mgda(normalize="l2")
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.25, 0.5]
    """
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"mgda: normalize is {normalize!r}, wanted one of {get_args(Normalize)}"
        )

    def weigh(gram, state, *, losses=None, present=None, **extra):
        del extra
        return weights(gram, losses, normalize=normalize, present=present), state

    return from_gramian("mgda", Rule(lambda: (), weigh))
