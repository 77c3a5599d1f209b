"""Random loss weighting, on gradients."""

import chex
import jax

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)


def weights(gram: chex.Array, key: chex.PRNGKey) -> chex.Array:
    """A softmax of standard normals.

    Args:
      gram: [T, T]; only its shape is read.
      key: typed PRNG key.

    Returns:
      [T] float32, positive, of sum one.

    **Follows**: Lin et al. 2022, "Reasonable Effectiveness of Random Weighting: A
      Litmus Test for Multi-Task Learning", alg. 1.

    >>> import jax.numpy as jnp
    >>> round(float(weights(jnp.eye(3), jax.random.key(0)).sum()), 5)
    1.0
    """
    count = gram_of("random", gram).shape[0]
    return jax.nn.softmax(jax.random.normal(key, (count,), "float32"))


def random(*, seed: int = 0) -> Aggregator:
    """Aggregates with new random weights at each step; see `weights.random`.

    Updates: leaves [T, ...] -> [...]. State: a typed PRNG key.

    Args:
      seed: of the weights.

    >>> import jax.numpy as jnp
    >>> tx = random(seed=1)
    >>> grads = {"w": jnp.ones((3, 2))}
    >>> out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> print(*(f"{x:.2f}" for x in out["w"]))
    1.00 1.00
    """

    def weigh(gram, key, **extra):
        del extra
        key, use = jax.random.split(key)
        return weights(gram, use), key

    rule = Rule(lambda: jax.random.key(seed), weigh, reads=())
    return from_gramian("random", rule)
