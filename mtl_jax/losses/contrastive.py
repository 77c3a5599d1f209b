"""Contrastive losses, one value per query."""

import chex
import jax
import jax.numpy as jnp


def infonce(
    scores: chex.Array, positives: chex.Array, *, active: chex.Array | None = None
) -> chex.Array:
    r"""How well each query tells its document from the others.

      -mean_{d+} log exp(s(q, d+)) / sum_{d in {d+} + negatives} exp(s(q, d))

    Scores are cosines over a temperature, such as
    `heads.prototype_logits(queries, heads.l2_normalize(documents), 1 / temperature)`,
    with the positives and negatives of every query among the documents: those of the
    other queries of a batch are its negatives.

    Args:
      scores: [B, M] floating point.
      positives: [B] integer, the column of a query's only positive, or [B, M] bool.
      active: [B, M] bool, False = the document does not take part for this query, such
        as one that may be relevant and is not labelled; None = all do. Positives take
        part in any case.

    Returns:
      [B] float32; +inf for a query without a positive, which is an error in the data
      and must not pass unseen.

    Raises:
      ValueError: if shapes or dtypes do not fit.

    **Follows**: van den Oord et al. 2018, "Representation Learning with Contrastive
    Predictive Coding"; with several positives Khosla et al. 2020, "Supervised
    Contrastive Learning", its sum outside of the logarithm.

    **Differs**: the other positives of a query are left out of the denominator.

    >>> import jax.numpy as jnp
    >>> [round(x, 4) for x in infonce(jnp.eye(2), jnp.arange(2)).tolist()]
    [0.3133, 0.3133]
    """
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"infonce: scores must be floats [B, M], are {scores.dtype}"
            f"{list(scores.shape)}"
        )
    rows, columns = scores.shape
    if jnp.issubdtype(positives.dtype, jnp.integer) and positives.shape == (rows,):
        wanted = jnp.arange(columns, dtype=positives.dtype)
        positives = positives[:, None] == wanted[None]
    masks = {"positives": positives, "active": positives if active is None else active}
    for name, mask in masks.items():
        if mask.dtype != jnp.bool_ or mask.shape != scores.shape:
            raise ValueError(
                f"infonce: {name} must be bool {list(scores.shape)}, is "
                f"{mask.dtype}{list(mask.shape)}"
            )
    against = ~positives if active is None else active & ~positives
    scores = scores.astype(jnp.float32)
    rest = jax.nn.logsumexp(scores, 1, where=against, keepdims=True)
    each = jnp.where(positives, jax.nn.softplus(rest - scores), 0)
    count = jnp.sum(positives, 1)
    mean = jnp.sum(each, 1) / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, mean, jnp.inf)
