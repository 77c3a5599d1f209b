"""Trimmed mean, coordinate by coordinate."""

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients

_UNROLLED = 512  # compare-exchanges up to which they are written out one by one


def _insert(lows, highs, value):
    """Lets a value pass the smallest and the largest so far; one falls out.

    Args:
      lows: the b smallest values so far, in any order.
      highs: the b largest of the others, in any order.
      value: the next one.

    Returns:
      New smallest and largest, and the value that is now neither.
    """
    kept_low, kept_high = [], []
    for low in lows:
        kept_low.append(jnp.minimum(low, value))
        value = jnp.maximum(low, value)
    for high in highs:
        kept_high.append(jnp.maximum(high, value))
        value = jnp.minimum(high, value)
    return kept_low, kept_high, value


def _mean_of_middle(x: chex.Array, trim: int) -> chex.Array:
    count, first = x.shape[0], 2 * trim
    wide = tree.wide_dtype(x.dtype)
    lows, highs = [], []
    for t in range(first):
        lows, highs, value = _insert(lows, highs, x[t].astype(wide))
        (lows if t < trim else highs).append(value)
    # What falls out is added up; sums minus extremes would drown in a huge extreme.
    total = jnp.zeros(x.shape[1:], wide)
    if first * count <= _UNROLLED:
        for t in range(first, count):
            lows, highs, value = _insert(lows, highs, x[t].astype(wide))
            total = total + value
        return total / (count - first)

    def body(t, carry):
        lows, highs, total = carry
        row = jax.lax.dynamic_index_in_dim(x, t, keepdims=False).astype(wide)
        lows, highs, value = _insert(lows, highs, row)
        return lows, highs, total + value

    _, _, total = jax.lax.fori_loop(first, count, body, (lows, highs, total))
    return total / (count - first)


def trimmed_mean(*, trim: int = 1) -> Aggregator:
    r"""Averages, at each coordinate, all but the b smallest and b largest values.

    Updates: leaves [T, ...] -> [...], computed in float32 and cast once. One read of
    the gradients: each value passes the b smallest and the b largest seen so far, and
    the one that falls out is added. Nothing is sorted, and no extreme is ever summed:
    up to b infinite values each way leave no trace, a NaN always does.

    Args:
      trim: b; wants T of `2 * trim + 1` or more.

    Raises:
      ValueError: a negative `trim`; at update, too few tasks.

    **Follows**: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards
      Optimal Statistical Rates", def. 2.

    >>> tx = trimmed_mean()
    >>> grads = {"w": jnp.array([[1.0, 5.0], [2.0, -1e30], [1e30, 6.0], [4.0, 7.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [3.0, 5.5]
    """
    if trim < 0:
        raise ValueError(f"trimmed_mean: trim is {trim}, wanted 0 or more")

    def update(task_grads, state, **extra):
        del extra
        count = tree.num_tasks("trimmed_mean", task_grads)
        if count < 2 * trim + 1:
            raise ValueError(
                f"trimmed_mean: {count} tasks, wanted at least {2 * trim + 1} "
                f"(2 * trim + 1)"
            )

        def leaf(x):
            if not tree.is_inexact(x):
                return x[0]
            return _mean_of_middle(x, trim).astype(x.dtype)

        return jax.tree.map(leaf, task_grads), state

    return from_gradients("trimmed_mean", lambda params: (), update, robust=True)
