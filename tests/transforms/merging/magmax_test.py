"""MagMax against a loop over entries."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def draw(seed, count=3):
    flat = np.random.default_rng(seed).integers(-4, 5, (count, 12)) * 0.5
    return flat, {
        "a": jnp.asarray(flat[:, :8].reshape(count, 2, 4), jnp.float32),
        "b": jnp.asarray(flat[:, 8:], jnp.bfloat16),
    }


def ravel(delta):
    return np.concatenate([np.ravel(delta[k]).astype(np.float32) for k in "ab"])


@hypothesis.given(st.integers(0, 2**31 - 1), st.booleans())
def test_takes_the_largest_and_the_last_of_equals(seed, weighted):
    flat, taus = draw(seed)
    weights = np.array([1.0, 2.0, 0.5]) if weighted else np.ones(3)
    want = np.zeros(12)
    for p in range(12):
        for t in range(3):
            if abs(weights[t] * flat[t, p]) >= abs(want[p]):
                want[p] = weights[t] * flat[t, p]
    np.testing.assert_array_equal(ravel(merging.magmax(taus, weights=weights)), want)


def test_one_task_equal_tasks_zero_and_sign():
    flat, taus = draw(0, 1)
    np.testing.assert_array_equal(ravel(merging.magmax(taus)), flat[0])
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), taus)
    np.testing.assert_array_equal(ravel(merging.magmax(twice)), flat[0])
    assert merging.magmax({"w": jnp.zeros((2, 2))})["w"].tolist() == [0.0, 0.0]
    _, three = draw(1)
    negated = ravel(merging.magmax(jax.tree.map(jnp.negative, three)))
    np.testing.assert_array_equal(negated, -ravel(merging.magmax(three)))


def test_structure_and_jit():
    _, taus = draw(2)
    taus |= {"n": jnp.ones((3, 2), jnp.int32), "e": jnp.zeros((3, 0)), "s": jnp.ones(3)}
    got = jax.jit(merging.magmax)(taus)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape[1:], x.dtype), taus
    )
