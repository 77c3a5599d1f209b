"""RAM and RAM+ against a loop over entries in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(flat, epsilon, weights, boost=None):
    count = len(flat)
    boost = np.ones(count) if boost is None else boost
    out = np.zeros(flat.shape[1])
    for p in range(flat.shape[1]):
        moved = [t for t in range(count) if abs(flat[t, p]) > epsilon]
        if len(moved) == 1:
            out[p] = weights[moved[0]] * boost[moved[0]] * flat[moved[0], p]
        elif moved:
            out[p] = np.mean([weights[t] * flat[t, p] for t in moved])
    return out


def boosts(flat, epsilon, gain, limit):
    moved = np.abs(flat) > epsilon
    count = moved.sum(0)
    shared, unique = ((moved & m).sum(1) for m in (count > 1, count == 1))
    return 1 + gain * np.clip(shared / np.maximum(unique, epsilon), 0, limit)


def draw(seed, count=3):
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=(count, 20)) * (rng.random((count, 20)) < 0.4)
    return flat, {
        "a": jnp.asarray(flat[:, :12].reshape(count, 3, 4), jnp.float32),
        "b": jnp.asarray(flat[:, 12:], jnp.float32),
    }


def ravel(delta):
    return np.concatenate([np.ravel(delta[k]) for k in "ab"])


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([1e-5, 0.5]))
def test_ram_matches_the_definition(seed, epsilon):
    flat, taus = draw(seed)
    weights = np.array([1.0, 0.5, 2.0])
    got = merging.ram(taus, epsilon=epsilon, weights=weights)
    want = oracle(flat, epsilon, weights)
    np.testing.assert_allclose(ravel(got), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@hypothesis.given(st.integers(0, 2**31 - 1))
def test_ram_plus_matches_the_definition(scope, seed):
    flat, taus = draw(seed)
    options = {"gain": 0.5, "limit": 1.0}
    got = merging.ram_plus(taus, scope=scope, **options)
    parts = [flat] if scope == "global" else [flat[:, :12], flat[:, 12:]]
    want = [oracle(p, 1e-5, np.ones(3), boosts(p, 1e-5, 0.5, 1.0)) for p in parts]
    np.testing.assert_allclose(ravel(got), np.concatenate(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [merging.ram, merging.ram_plus])
def test_one_equal_zero_disjoint_and_order(rule):
    flat, taus = draw(0, 1)
    np.testing.assert_allclose(ravel(rule(taus)), flat[0], rtol=1e-6)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), taus)
    np.testing.assert_allclose(ravel(rule(twice)), flat[0], rtol=1e-6)
    assert rule({"w": jnp.zeros((3, 2))})["w"].tolist() == [0.0, 0.0]
    apart = {"w": jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}
    assert rule(apart)["w"].tolist() == [1.0, 2.0, 0.0]
    _, three = draw(1)
    back = ravel(rule(jax.tree.map(lambda x: x[::-1], three)))
    np.testing.assert_allclose(back, ravel(rule(three)), rtol=1e-5, atol=1e-7)
    opposite = {"w": jnp.array([[1.0], [-1.0]])}
    assert rule(opposite)["w"].tolist() == [0.0]


def test_dtypes_structure_and_jit():
    taus = {
        "w": jnp.ones((2, 3), jnp.bfloat16),
        "n": jnp.ones((2, 2), jnp.int32),
        "e": jnp.zeros((2, 0)),
        "s": jnp.ones(2),
    }
    for rule in (merging.ram, merging.ram_plus):
        got = jax.jit(rule)(taus)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
            lambda x: (x.shape[1:], x.dtype), taus
        )


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (merging.ram, {"epsilon": -1.0}, "ram: epsilon is -1.0, wanted 0 or more"),
        (merging.ram_plus, {"gain": "x"}, "ram_plus: gain is 'x', wanted a number"),
        (merging.ram_plus, {"limit": -1}, "ram_plus: limit is -1.0, wanted 0 or more"),
        (merging.ram_plus, {"scope": "row"}, "ram_plus: scope is 'row'"),
    ],
)
def test_refuses_by_name(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule({"w": jnp.ones((2, 3))}, **options)
