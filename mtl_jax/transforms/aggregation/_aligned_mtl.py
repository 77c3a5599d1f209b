"""Aligned-MTL, task gradients made orthogonal and equally long before the sum."""

from typing import Any, Literal

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)
from mtl_jax.transforms.aggregation._cosine import dot, preference_of, rank_cutoff

SCALES = ("min", "median", "mean")
Scale = Literal["min", "median", "mean"]


def weights(
    gram: chex.Array, preference: Any = None, *, scale: Scale = "min"
) -> chex.Array:
    r"""Weights that align the principal components of the task gradients.

    With `gram = V diag(l) V^T` over the r eigenvalues that are not rounding,

      w = sqrt(s) V diag(l)^(-1/2) V^T p,  s = min(l), median(l) or mean(l).

    Args:
      gram: [T, T], inner products of task gradients.
      preference: [T]; 1 / T each where None.
      scale: which eigenvalue the components are scaled to; the median of an even number
        is the lower of the middle two.

    Returns:
      [T] float32; `preference` where all gradients are zero.

    Raises:
      ValueError: `gram` is not square, `preference` is not [T], or an unknown `scale`.

    **Follows**: Senushkin et al. 2023, "Independent Component Alignment for Multi-Task
      Learning", alg. 1.
    **Differs**: "median" and "mean" are not in the paper but in its authors' code.

    >>> weights(jnp.diag(jnp.array([4.0, 1.0]))).tolist()
    [0.25, 0.5]
    """
    if scale not in SCALES:
        raise ValueError(f"aligned_mtl: scale is {scale!r}, wanted one of {SCALES}")
    gram = gram_of("aligned_mtl", gram)
    count = len(gram)
    target = preference_of(
        "aligned_mtl",
        jnp.full(count, 1 / count) if preference is None else preference,
        count,
        gram.dtype,
    )
    largest = jnp.max(jnp.diag(gram))
    values, vectors = jnp.linalg.eigh(gram / jnp.where(largest == 0, 1, largest))
    kept = values > rank_cutoff(count, gram.dtype) * values[-1]
    rank = jnp.sum(kept, dtype=jnp.int32)
    first = count - rank  # Eigenvalues ascend, so the kept ones come last.
    level = {
        "min": lambda: values[jnp.minimum(first, count - 1)],
        "median": lambda: values[jnp.minimum(first + (rank - 1) // 2, count - 1)],
        "mean": lambda: (
            jnp.sum(jnp.where(kept, values, 0))
            / jnp.maximum(rank, 1).astype(gram.dtype)
        ),
    }[scale]()
    root = jnp.where(kept, jnp.sqrt(level / jnp.where(kept, values, 1)), 0)
    aligned = dot(vectors, root * dot(vectors.T, target))
    return jnp.where(largest == 0, target, aligned)


def aligned_mtl(*, preference: Any = None, scale: Scale = "min") -> Aggregator:
    """Aggregates by Aligned-MTL; see `weights.aligned_mtl`.

    Updates: leaves [T, ...] -> [...].

    Args:
      preference: [T]; 1 / T each where None.
      scale: "min", "median" or "mean" of the eigenvalues.

    >>> tx = aligned_mtl()
    >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [0.5, 0.5]
    """
    if scale not in SCALES:
        raise ValueError(f"aligned_mtl: scale is {scale!r}, wanted one of {SCALES}")
    rule = stateless(lambda gram: weights(gram, preference, scale=scale))
    return from_gramian("aligned_mtl", rule)
