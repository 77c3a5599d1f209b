"""The mix of two models that share an ancestor."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree


@jax.jit
def _mix(first, second, shares):
    def leaf(x, y, share):
        if not tree.is_inexact(x):
            return x
        wide = tree.wide_dtype(x.dtype)
        share = share.astype(wide)
        mixed = share * x.astype(wide) + (1 - share) * y.astype(wide)
        mixed = mixed.astype(x.dtype)
        return jnp.where(share == 1, x, jnp.where(share == 0, y.astype(x.dtype), mixed))

    return jax.tree.map(leaf, first, second, shares)


def mix_weights(first: Any, second: Any, share: Any) -> Any:
    """Weighs two models against each other, `share * first + (1 - share) * second`.

    Args:
      first: tree of parameters, leaves [...].
      second: tree like `first`.
      share: one scalar, or a tree of scalars like `first`. 1 gives `first` and 0
        `second`, bit for bit.

    Returns:
      Tree like `first` in its dtypes; computed in float32 (or wider), cast once. Leaves
      that are not floating point are those of `first`.

    Raises:
      ValueError: models that do not match, by leaf, or a share that is neither a
        scalar nor a tree of scalars.

    Follows: Lin et al. 2023, "SPHINX: The Joint Mixing of Weights, Tasks, and Visual
      Embeddings for Multi-modal Large Language Models": a model trained on real texts
      and one that went on from it on synthetic ones.

    >>> mix_weights({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, 0.25)["w"].tolist()
    [0.25, 0.25]
    """
    tree.check_match("mix_weights", first, second, other_name="second")
    if jax.tree.structure(share) == jax.tree.structure(0):
        share = jax.tree.map(lambda _: share, first)
    shares = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), share)
    same = jax.tree.structure(shares) == jax.tree.structure(first)
    if not same or any(s.ndim for s in jax.tree.leaves(shares)):
        raise ValueError(
            "mix_weights: share is neither a scalar nor a tree of scalars like first"
        )
    tree.check_finite("mix_weights: share", shares)
    arrays = (jax.tree.map(jnp.asarray, model) for model in (first, second))
    return _mix(*arrays, shares)
