"""Metrics of rankings, one value per query."""

import chex
import jax.numpy as jnp


def ndcg(scores: chex.Array, relevance: chex.Array, k: int = 10) -> chex.Array:
    r"""Discounted gain of the first k documents, against that of the best order.

      sum_{r <= k} rel(r) / log2(r + 1)  /  the same of the ideal order

    Args:
      scores: [..., M] floating point; the first of equal ones comes first.
      relevance: [..., M], gains of 0 and above, any real dtype or bool.
      k: depth; documents beyond M count for nothing.

    Returns:
      [...] float32; 0 for a query without a relevant document, NaN for NaN scores.

    Raises:
      ValueError: if shapes or k do not fit.

    **Follows**: Järvelin and Kekäläinen 2002, "Cumulated Gain-Based Evaluation of IR
    Techniques", with linear gains as trec_eval has them.

    >>> import jax.numpy as jnp
    >>> round(float(ndcg(jnp.array([0.1, 0.9, 0.5]), jnp.array([1, 0, 1]))), 4)
    0.6934
    """
    if scores.shape != relevance.shape or not scores.ndim:
        raise ValueError(
            f"ndcg: wanted scores and relevance [..., M], found {scores.shape} and "
            f"{relevance.shape}"
        )
    if k < 1:
        raise ValueError(f"ndcg: k must be 1 or more, is {k}")
    k = min(k, scores.shape[-1])
    gains = relevance.astype(jnp.float32)
    order = jnp.argsort(-scores.astype(jnp.float32), axis=-1, stable=True)[..., :k]
    found = jnp.take_along_axis(gains, order, axis=-1)
    best = -jnp.sort(-gains, axis=-1)[..., :k]
    discount = 1 / jnp.log2(jnp.arange(2, k + 2, dtype=jnp.float32))
    found, best = (
        jnp.einsum("...k,k->...", x, discount, precision="highest")
        for x in (found, best)
    )
    value = jnp.where(best > 0, found / jnp.where(best > 0, best, 1), 0)
    return jnp.where(jnp.any(jnp.isnan(scores), axis=-1), jnp.nan, value)
