"""Multi-SLERP against the peer's three steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(x, weights):
    """Mean direction, tangent space, exponential map, mean length; x: [T, P]."""
    w = np.asarray(weights, np.float64) / np.sum(weights)
    norms = np.linalg.norm(x, axis=1)
    u = x / np.where(norms > 0, norms, 1)[:, None]
    mean = w @ u
    mean /= np.linalg.norm(mean)
    tangent = w @ (u - (u @ mean)[:, None] * mean)
    length = np.linalg.norm(tangent) + 1e-8
    point = np.cos(length) * mean + np.sin(length) / length * tangent
    return (w @ norms) * point


def draw(seed, count=3):
    return np.random.default_rng(seed).normal(size=(count, 3, 4)) + 0.5


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (2.0, -0.5, 1.0)]
)
def test_matches_the_peer(weights):
    x = draw(0)
    experts = {"w": jnp.asarray(x, jnp.float32)}
    got = merging.multislerp(experts, weights=weights)["w"]
    want = oracle(x.reshape(3, -1), weights).reshape(3, 4)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    rows = merging.multislerp(experts, weights=weights, scope="row")["w"]
    want = [oracle(x[:, i], weights) for i in range(3)]
    np.testing.assert_allclose(rows, want, rtol=2e-5, atol=5e-5)


def test_two_models_at_equal_weights_are_slerp_of_equal_lengths():
    x = draw(1, 2)
    x /= np.linalg.norm(x, axis=(1, 2), keepdims=True)
    experts = {"w": jnp.asarray(x, jnp.float32)}
    want = merging.slerp(experts, linear_above=1.0)["w"]
    got = merging.multislerp(experts)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_directions_that_cancel_are_linear():
    a = jnp.array([1.0, -2.0, 2.0])
    for stacked in (jnp.stack([a, -3 * a]), jnp.stack([a, -a, 0 * a])):
        got = merging.multislerp({"w": stacked})["w"]
        np.testing.assert_allclose(got, stacked.mean(0), rtol=1e-5, atol=1e-6)
    assert merging.multislerp({"w": jnp.zeros((3, 2))})["w"].tolist() == [0.0, 0.0]


def test_order_equal_models_one_model_dtype_and_jit():
    x = jnp.asarray(draw(2), jnp.float32)
    base = merging.multislerp({"w": x})["w"]
    back = merging.multislerp({"w": x[::-1]})["w"]
    np.testing.assert_allclose(back, base, rtol=1e-5, atol=1e-6)
    same = merging.multislerp({"w": jnp.stack([x[0]] * 3)})["w"]
    np.testing.assert_allclose(same, x[0], rtol=1e-5)
    np.testing.assert_array_equal(merging.multislerp({"w": x[:1]})["w"], x[0])
    jitted = jax.jit(merging.multislerp)({"w": x})["w"]
    np.testing.assert_allclose(jitted, base, rtol=1e-6)
    mixed = {"w": x.astype(jnp.bfloat16), "s": x[:, 0, 0], "n": jnp.ones((3, 1), int)}
    got = merging.multislerp(mixed)
    assert [v.dtype for v in jax.tree.leaves(got)] == [
        v.dtype for v in jax.tree.leaves(mixed)
    ]


def test_refuses_by_name():
    with pytest.raises(ValueError, match="multislerp: scope is 'global'"):
        merging.multislerp({"w": jnp.ones((2, 3))}, scope="global")
