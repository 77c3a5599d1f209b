"""Model recombination: what a shuffle of parts must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def models(count=4):
    rng = np.random.default_rng(0)
    shapes = {"a": {"x": (3,), "y": (2, 2)}, "b": {"x": (3,), "y": ()}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def order(before, after):
    """From which task each task's leaf comes."""
    flat = np.asarray(before).reshape(len(before), -1)
    mixed = np.asarray(after).reshape(len(before), -1)
    return [int(np.flatnonzero((flat == row).all(1))[0]) for row in mixed]


def test_every_leaf_is_a_permutation_and_parts_stay_together():
    taus = models()
    orders = []
    for seed in range(8):
        key = jax.random.key(seed)
        alone = merging.recombine(taus, key=key)
        found = [
            order(*x)
            for x in zip(jax.tree.leaves(taus), jax.tree.leaves(alone), strict=True)
        ]
        assert all(sorted(x) == [0, 1, 2, 3] for x in found)
        orders.append(found)
        parts = merging.recombine(taus, key=key, part=lambda name: name[0])
        for name in "ab":
            x, y = (order(taus[name][k], parts[name][k]) for k in "xy")
            assert x == y
    assert any(x[0] != x[1] for x in orders)
    assert any(x != orders[0] for x in orders)


def test_same_key_jit_dtypes_one_task_and_errors():
    taus = models() | {"n": jnp.arange(4), "h": jnp.ones((4, 2), jnp.bfloat16)}
    key = jax.random.key(3)
    want = merging.recombine(taus, key=key)
    got = jax.jit(lambda taus, key: merging.recombine(taus, key=key))(taus, key)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.dtype, want) == jax.tree.map(
        lambda x: x.dtype, taus
    )
    one = jax.tree.map(lambda x: x[:1], taus)
    jax.tree.map(np.testing.assert_array_equal, merging.recombine(one, key=key), one)
    with pytest.raises(ValueError, match="recombine: key is 3, wanted one made by"):
        merging.recombine(taus, key=3)
    with pytest.raises(ValueError, match="recombine"):
        merging.recombine({"w": jnp.full((2, 2), jnp.nan)}, key=key)
