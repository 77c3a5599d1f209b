"""The Karcher mean against the iteration on full vectors in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def oracle(x, weights, steps=10, tolerance=1e-5):
    """Exponential of the mean logarithm, repeated; x: [T, P]."""
    w = np.asarray(weights, np.float64) / np.sum(weights)
    norms = np.linalg.norm(x, axis=1)
    a = w * (norms > 0)
    a /= a.sum()
    units = x / np.where(norms > 0, norms, 1)[:, None]
    u = a @ units
    u /= np.linalg.norm(u)
    for _ in range(steps):
        tangent = np.zeros_like(u)
        for t in range(len(x)):
            cosine = np.clip(u @ units[t], -1, 1)
            angle = np.arccos(cosine)
            if a[t] > 0 and angle > 1e-12:
                tangent += a[t] * angle / np.sin(angle) * (units[t] - cosine * u)
        length = np.linalg.norm(tangent)
        if length < tolerance:
            break
        u = np.cos(length) * u + np.sin(length) * tangent / length
    return (w @ norms) * u


def draw(seed, count=4, shared=1.0):
    rng = np.random.default_rng(seed)
    return shared * rng.normal(size=(2, 5)) + rng.normal(size=(count, 2, 5))


def merge(x, **options):
    return merging.karcher({"w": jnp.asarray(x, jnp.float32)}, **options)["w"]


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.5, 2.0, 100.0]))
def test_matches_the_iteration(seed, shared):
    x = draw(seed, shared=shared)
    weights = [1.0, 2.0, 0.5, 1.0]
    want = oracle(x.reshape(4, -1), weights, 30, 0).reshape(2, 5)
    got = merge(x, weights=weights, max_steps=30)
    np.testing.assert_allclose(got / shared, want / shared, rtol=1e-4, atol=1e-4)


def test_rows_and_bounded_steps():
    x = draw(0)
    got = merge(x, scope="row")
    want = [oracle(x[:, i], np.ones(4)) for i in range(2)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for steps in (0, 1):
        want = oracle(x.reshape(4, -1), np.ones(4), steps).reshape(2, 5)
        np.testing.assert_allclose(
            merge(x, max_steps=steps), want, rtol=1e-4, atol=1e-4
        )
    zeroth = merging.multislerp({"w": jnp.asarray(x, jnp.float32)})["w"]
    np.testing.assert_allclose(merge(x, max_steps=0), zeroth, rtol=1e-5, atol=1e-6)


def test_logarithms_cancel_at_the_mean():
    x = draw(1).reshape(4, -1)
    u = np.asarray(merge(draw(1), max_steps=50, tolerance=0.0), np.float64).ravel()
    u /= np.linalg.norm(u)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = units @ u
    angle = np.arccos(cosine)
    tangent = (angle / np.sin(angle)) @ (units - cosine[:, None] * u)
    assert np.linalg.norm(tangent) < 1e-4


def test_two_models_are_the_middle_of_the_arc():
    x = draw(2, 2)
    x /= np.linalg.norm(x, axis=(1, 2), keepdims=True)
    experts = {"w": jnp.asarray(x, jnp.float32)}
    want = merging.slerp(experts, linear_above=1.0)["w"]
    np.testing.assert_allclose(merge(x), want, rtol=1e-4, atol=1e-5)


def test_zero_opposite_equal_and_single_models():
    a = draw(3, 1)[0]
    np.testing.assert_allclose(merge(np.stack([a, a, 0 * a])), a * 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(merge(np.stack([a, -3 * a])), -a, rtol=1e-5)
    assert not merge(np.zeros((3, 2, 5))).any()
    np.testing.assert_array_equal(merge(a[None]), a.astype(np.float32))
    np.testing.assert_allclose(merge(np.stack([a] * 3)), a, rtol=1e-5)


def test_order_dtype_and_jit():
    x = draw(4)
    np.testing.assert_allclose(merge(x[::-1]), merge(x), rtol=1e-4, atol=1e-5)
    experts = {"w": jnp.asarray(x, jnp.bfloat16), "n": jnp.ones((4, 2), jnp.int32)}
    got = jax.jit(merging.karcher)(experts)
    assert got["w"].dtype == jnp.bfloat16 and got["n"].dtype == jnp.int32
    batch = jnp.asarray(np.stack([x, x[::-1]]), jnp.float32)
    both = jax.vmap(lambda v: merging.karcher({"w": v})["w"])(batch)
    np.testing.assert_allclose(both[0], merge(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 0.0]}, "wanted all of them positive"),
        ({"max_steps": -1}, "max_steps"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"scope": "global"}, "scope is 'global'"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"karcher: .*{message}"):
        merging.karcher({"w": jnp.ones((2, 3))}, **options)
