"""NearSwap against the interpolation that defines it, in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(tau, threshold):
    """The weight min(1, t / |a - b|) of the other model."""
    gap = np.maximum(np.abs(tau), 1e-6)
    return np.clip(threshold / gap, 0, 1) * tau


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([1e-3, 0.3, 5.0]))
def test_matches_the_interpolation(seed, threshold):
    tau = np.random.default_rng(seed).normal(size=(1, 3, 4))
    got = merging.nearswap({"w": jnp.asarray(tau, jnp.float32)}, threshold=threshold)
    np.testing.assert_allclose(got["w"], oracle(tau[0], threshold), rtol=1e-6)


def test_limits_and_small_thresholds():
    x = jnp.array([[1.0, -2.0, 0.0, 1e-7]])
    assert merging.nearswap({"w": x}, threshold=0.0)["w"].tolist() == [0.0] * 4
    np.testing.assert_array_equal(merging.nearswap({"w": x}, threshold=3.0)["w"], x[0])
    small = merging.nearswap({"w": x}, threshold=5e-7)["w"]
    np.testing.assert_allclose(small, [5e-7, -5e-7, 0.0, 1e-7], rtol=1e-6)


def test_several_tasks_thresholds_weights_dtype_and_jit():
    taus = {"w": jnp.array([[4.0, 1.0], [-4.0, 1.0]], jnp.bfloat16)}
    got = jax.jit(
        lambda taus: merging.nearswap(taus, threshold=[2.0, 1.0], weights=[1.0, 2.0])
    )({**taus, "n": jnp.ones((2, 1), jnp.int32), "e": jnp.zeros((2, 0))})
    assert got["w"].dtype == jnp.bfloat16 and got["w"].tolist() == [0.0, 3.0]
    assert got["n"].tolist() == [1] and got["e"].shape == (0,)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (-1.0, r"threshold is -1.0, wanted 0 or more"),
        ([1.0, 1.0, 1.0], r"threshold is \(3,\), wanted a scalar or \(2,\)"),
        ("x", "threshold are 'x', wanted numbers"),
        (float("nan"), "'threshold' holds NaN"),
    ],
)
def test_refuses_by_name(threshold, message):
    with pytest.raises(ValueError, match=f"nearswap: {message}"):
        merging.nearswap({"w": jnp.ones((2, 3))}, threshold=threshold)
