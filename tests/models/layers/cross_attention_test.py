import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import CrossAttention, look_around
from mtl_jax.models.layers.cache import LayerCache

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X = jnp.array(RNG.normal(size=(4, 3, 8)), jnp.float32)
MEMORY = jnp.array(RNG.normal(size=(2, 5, 8)), jnp.float32)
SEGMENTS = jnp.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LAYER = CrossAttention(2, 2, 4)


def apply(params, segments, memory=MEMORY, layer=LAYER, **options):
    context = look_around(jnp.ones((2, 6), jnp.int32), segments)
    return layer.apply(params, X, context, memory, **options)


def started(fill):
    context = look_around(jnp.ones((2, 6), jnp.int32), SEGMENTS)
    return {"params": fill(LAYER, X, context, MEMORY)}


def test_every_row_reads_the_memory_of_its_group(fill):
    params = started(fill)
    got, cache = apply(params, SEGMENTS)
    assert cache is None
    p = jax.tree.map(
        lambda x: np.asarray(x["kernel"], np.float64),
        params["params"],
        is_leaf=lambda x: "kernel" in x,
    )
    for row in range(4):
        own = np.asarray(MEMORY[row // 2], np.float64)[: [4, 2][row // 2]]
        query, heads = np.asarray(X[row], np.float64) @ p["query"], np.zeros((3, 8))
        for h in (slice(0, 4), slice(4, 8)):
            logits = query[:, h] @ (own @ p["key"])[:, h].T / 2
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            heads[:, h] = weights @ (own @ p["value"])[:, h]
        np.testing.assert_allclose(got[row], heads @ p["out"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 1])
def test_keys_and_values_are_kept_and_read(fill, layer):
    params = started(fill)
    want, _ = apply(params, SEGMENTS)
    shape = (2, 5, 2, 4) if layer is None else (3, 2, 5, 2, 4)
    number = None if layer is None else jnp.int32(layer)
    empty = LayerCache(jnp.zeros(shape), jnp.zeros(shape), number)
    first, cache = apply(params, SEGMENTS, cache=empty)
    again, same = apply(params, SEGMENTS, None, cache=cache)
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(again, want)
    np.testing.assert_array_equal(same.key, cache.key)
    if layer is not None:  # Other layers are left alone.
        assert not np.any(cache.value[jnp.array([0, 2])])
