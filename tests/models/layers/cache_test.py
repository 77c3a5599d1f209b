import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.layers import cache as lib

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
DEPTH, BATCH, SIZE = 3, 3, 6


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_are_written_where_they_end(stacked, tokens):
    """Each row on its own; nothing else moves, and nothing lands past the end."""
    shape = (BATCH, SIZE, 2, 5)
    old = normal(DEPTH, *shape) if stacked else normal(*shape)
    layer = jnp.int32(1) if stacked else None
    key, value = normal(BATCH, tokens, 2, 5), normal(BATCH, tokens, 2, 5)
    start = np.array([0, 4, 6], np.int32)
    count = np.array([tokens, tokens, tokens], np.int32)
    count[0] -= 1
    made = jax.jit(lib.write_cache)(
        lib.LayerCache(old, -old, layer), key, value, start, count
    )
    want = {"key": np.array(old), "value": np.array(-old)}
    for name, new in (("key", key), ("value", value)):
        own = want[name][1] if stacked else want[name]
        for b in range(BATCH):
            for n in range(count[b]):
                if start[b] + n < SIZE:
                    own[b, start[b] + n] = new[b, n]
        np.testing.assert_array_equal(getattr(made, name), want[name])
    read = lib.read_cache(made)
    np.testing.assert_array_equal(read[0], want["key"][1] if stacked else want["key"])


def test_the_buffers_keep_their_dtype():
    empty = jnp.zeros((1, 2, 1, 2), jnp.bfloat16)
    one = jnp.ones((1, 1, 1, 2), jnp.float32)
    start, count = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    made = lib.write_cache(lib.LayerCache(empty, empty), one, one, start, count)
    assert made.key.dtype == made.value.dtype == jnp.bfloat16


def decoder(**options):
    return models.Decoder(
        depth=2, num_heads=4, num_kv_heads=2, width=12, max_positions=9, **options
    )


def test_shapes_follow_the_model():
    made = models.init_cache(decoder(), 5, 7)
    assert sorted(made) == ["layers_0", "layers_1", "length"]
    assert made["layers_1"]["value"].shape == (5, 7, 2, 3)
    made = models.init_cache(decoder(scan=True, dtype=jnp.bfloat16), 5, 7)
    assert sorted(made) == ["layers", "length"]
    assert made["layers"]["key"].shape == (2, 5, 7, 2, 3)
    assert made["layers"]["key"].dtype == jnp.bfloat16
    assert made["length"].shape == (5,)
    half = models.init_cache(decoder(), 5, 7, jnp.float16)
    assert half["layers_0"]["key"].dtype == jnp.float16


@pytest.mark.parametrize("length", [0, 10])
def test_lengths_beyond_the_context_are_refused(length):
    with pytest.raises(ValueError, match=rf"init_cache: .*\[1, 9\].* is {length}"):
        models.init_cache(decoder(), 1, length)


@pytest.mark.parametrize("scan", [False, True])
def test_rows_can_be_picked(scan):
    made = models.init_cache(decoder(scan=scan), 3, 4)
    made = jax.tree.map(lambda x: jnp.array(RNG.normal(size=x.shape)), made)
    rows = jnp.array([2, 2, 0, 1])
    got = models.reorder_cache(made, rows)
    axis = 1 if scan else 0
    for name, part in made.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(part), strict=True):
            picked = np.take(np.asarray(b), rows, axis=0 if name == "length" else axis)
            np.testing.assert_array_equal(a, picked)
