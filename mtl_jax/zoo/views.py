"""Random changes of inputs that leave their class what it is."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp


def perturb(
    inputs: Mapping[str, chex.Array], key: chex.PRNGKey, strength: Any
) -> dict[str, chex.Array]:
    """A view of a batch: noise on what is measured, dropped tokens in texts.

    Floating point fields get Gaussian noise of `strength` times the deviation of the
    whole batch; where there is an `attention_mask`, each token but the first of a row
    is masked out with probability `strength`. Other fields pass.

    Args:
      inputs: one batch, leaves [B, ...].
      key: typed PRNG key.
      strength: 0 leaves everything as it is; for texts below 1. May be traced.

    Returns:
      A dict like `inputs`.

    >>> view = perturb({"x": jnp.ones((2, 3))}, jax.random.key(0), 0.5)
    >>> view["x"].tolist()  # Nothing varies, so there is nothing to drown.
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    found = dict(inputs)
    for place, (name, x) in enumerate(sorted(inputs.items())):
        draw = jax.random.fold_in(key, place)
        if name == "attention_mask":
            keep = jax.random.bernoulli(draw, 1 - strength, x.shape)
            found[name] = x * keep.at[:, 0].set(True).astype(x.dtype)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            size = jnp.asarray(strength, x.dtype) * jnp.std(x)
            found[name] = x + size * jax.random.normal(draw, x.shape, x.dtype)
    return found
