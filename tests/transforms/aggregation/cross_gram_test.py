import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def grads_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2, 3), "b": (3,), "c": (3, 4)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def flat(grads):
    rows = [np.reshape(x, (3, -1)) for x in jax.tree.leaves(grads)]
    return np.concatenate(rows, 1, dtype=np.float64)


def test_is_the_product_of_two_batches():
    first, second = grads_of(0), grads_of(1)
    found = aggregation.cross_gram(first, second)
    np.testing.assert_allclose(found, flat(first) @ flat(second).T, rtol=1e-5)


def test_refuses_trees_that_do_not_match():
    second = grads_of(1)
    del second["c"]
    with pytest.raises(ValueError, match="cross_gram: 'c' is in first but not in sec"):
        aggregation.cross_gram(grads_of(0), second)
