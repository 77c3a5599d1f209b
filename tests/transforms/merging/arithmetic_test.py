"""Sums, means, negation, analogy and DARE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


@pytest.fixture
def taus():
    return {"w": jnp.array([[1.0, 2.0], [3.0, -4.0], [0.5, 8.0]])}


def test_against_hand_computed_values(taus):
    w = jnp.array([1.0, 2.0, 0.0])
    assert merging.task_arithmetic(taus)["w"].tolist() == [4.5, 6.0]
    assert merging.task_arithmetic(taus, weights=w)["w"].tolist() == [7.0, -6.0]
    assert merging.negate(taus, weights=w)["w"].tolist() == [-7.0, 6.0]
    np.testing.assert_allclose(
        merging.average(taus, weights=w)["w"], [7 / 3, -2.0], rtol=1e-6
    )
    assert merging.analogy(taus)["w"].tolist() == [2.5, 2.0]


def test_analogy_wants_three_tasks():
    with pytest.raises(ValueError, match="analogy: there are 2 tasks, wanted 3"):
        merging.analogy({"w": jnp.ones((2, 1))})


def test_dare_is_unbiased_and_thins_each_task_apart():
    taus = {"a": jnp.ones((2, 5000)), "b": jnp.ones((2, 5000))}
    delta = merging.dare(taus, density=0.25, key=jax.random.key(0))
    values, counts = np.unique(np.asarray(delta["a"]), return_counts=True)
    assert values.tolist() == [0.0, 4.0, 8.0]
    want = np.array([0.75**2, 2 * 0.75 * 0.25, 0.25**2])
    np.testing.assert_allclose(counts / 5000, want, atol=0.025)
    assert np.any(delta["a"] != delta["b"])
    np.testing.assert_allclose(np.mean(delta["a"]), 2.0, atol=0.1)
    plain = merging.dare(taus, density=0.25, key=jax.random.key(0), rescale=False)
    np.testing.assert_array_equal(plain["a"] * 4, delta["a"])


def test_dare_refuses_density_zero():
    with pytest.raises(ValueError, match="dare: density is 0"):
        merging.dare({"w": jnp.ones((1, 2))}, density=0, key=jax.random.key(0))
