"""Krum, the mean of the task gradients that lie closest to their neighbours."""

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    from_gramian,
    gram_of,
    stateless,
)


def weights(
    gram: chex.Array, faulty: int = 0, selected: int = 1, *, squared: bool = True
) -> chex.Array:
    r"""Equal weights for the gradients with the smallest scores, zero for the others.

    The score of task i is the sum of `|g_i - g_j|^2` over its T - f - 2 nearest j.

    Args:
      gram: [T, T], inner products of task gradients.
      faulty: f, how many gradients may be arbitrary.
      selected: k, how many gradients to average.
      squared: False sums the distances themselves.

    Returns:
      [T] float32, `1 / selected` or zero; ties go to the earlier task.

    Raises:
      ValueError: `gram` is not square, fewer than f + 3 tasks, or k not in 1 .. T.

    **Follows**: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine
      Tolerant Gradient Descent", sec. 4 and, for k > 1, Multi-Krum.
    **Differs**: distances come from inner products, so those far below the length of
      the gradients (3e-4 of it) are rounding. TorchJD sums distances, which is
      `squared=False`; the paper their squares.

    >>> grads = jnp.array([[1.0], [1.25], [1.5], [9.0]])
    >>> weights(grads @ grads.T).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    _check(faulty, selected)
    gram = gram_of("krum", gram)
    count = len(gram)
    if count < faulty + 3 or count < selected:
        raise ValueError(
            f"krum: {count} tasks, wanted at least {max(faulty + 3, selected)} "
            f"(faulty + 3 and selected)"
        )
    norms = jnp.diag(gram)
    square = jnp.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    distance = square if squared else jnp.sqrt(square)
    itself = jnp.eye(count, dtype=bool)
    nearest, _ = jax.lax.top_k(
        -jnp.where(itself, jnp.inf, distance), count - faulty - 2
    )
    _, chosen = jax.lax.top_k(jnp.sum(nearest, 1), selected)
    share = jnp.zeros(count, gram.dtype).at[chosen].set(1 / selected)
    # Infinity and NaN are not outvoted but shown: they would reach the sum anyway.
    return jnp.where(jnp.isfinite(jnp.sum(norms)), share, jnp.nan)


def krum(*, faulty: int = 0, selected: int = 1, squared: bool = True) -> Aggregator:
    """Aggregates by (Multi-)Krum; see `weights.krum`.

    Updates: leaves [T, ...] -> [...].

    Args:
      faulty: how many gradients may be arbitrary; wants T of `faulty + 3` or more.
      selected: how many gradients to average.
      squared: False scores by distances, not by their squares.

    >>> tx = krum()
    >>> grads = {"w": jnp.array([[1.0], [1.25], [1.5], [9.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(1)}))[0]["w"].tolist()
    [1.25]
    """
    _check(faulty, selected)
    rule = stateless(lambda gram: weights(gram, faulty, selected, squared=squared))
    return from_gramian("krum", rule)


def _check(faulty: int, selected: int) -> None:
    if faulty < 0:
        raise ValueError(f"krum: faulty is {faulty}, wanted 0 or more")
    if selected < 1:
        raise ValueError(f"krum: selected is {selected}, wanted 1 or more")
