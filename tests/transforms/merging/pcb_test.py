"""PCB against the released computation on full vectors in float64."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def normalised(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return np.where(high > low, (x - low) / np.where(high > low, high - low, 1), 1)


def oracle(x, density, clip=1e-4):
    """x: [T, n]; clip, score, floor at the top share, average."""
    count, length = x.shape
    order = np.sort(np.abs(x), 1)
    cut = math.floor(clip * length)
    low, high = order[:, cut], order[:, length - 1 - cut]
    size = np.clip(np.abs(x), low[:, None], high[:, None])
    score = np.exp(count * normalised(size) ** 2) * np.tanh(x * x.sum(0))
    floor = np.sort(score, 1)[:, length - math.ceil(density * length - 1e-9)]
    share = normalised(np.maximum(score, floor[:, None]))
    total = share.sum(0)
    merged = (share * np.sign(x) * size).sum(0)
    return np.where(total > 0, merged / np.where(total > 0, total, 1), 0)


def draw(seed, count=3, shared=0.5):
    rng = np.random.default_rng(seed)
    flat = shared * rng.normal(size=40) + rng.normal(size=(count, 40))
    return flat, {
        "a": jnp.asarray(flat[:, :28].reshape(count, 4, 7), jnp.float32),
        "b": jnp.asarray(flat[:, 28:], jnp.float32),
    }


def ravel(delta):
    return np.concatenate([np.ravel(delta[k]) for k in "ab"])


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10)
def test_matches_the_released_computation(density, seed):
    flat, taus = draw(seed)
    got = ravel(merging.pcb(taus, density=density, clip=0.05))
    want = oracle(flat, density, 0.05)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_floor_below_zero():
    # Two tasks against a third: most of its scores are negative.
    flat, taus = draw(0)
    flat[2] = -0.2 * flat[0]
    flat[1] = flat[0]
    taus = {
        "a": jnp.asarray(flat[:, :28].reshape(3, 4, 7), jnp.float32),
        "b": jnp.asarray(flat[:, 28:], jnp.float32),
    }
    want = oracle(flat, 0.5)
    got = ravel(merging.pcb(taus, density=0.5))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    traced = jax.jit(lambda taus: merging.pcb(taus, density=0.5))(taus)
    np.testing.assert_allclose(ravel(traced), got, rtol=1e-5, atol=1e-6)


def test_leaves_by_themselves_and_weights():
    flat, taus = draw(1)
    got = merging.pcb(taus, density=0.4, scope="leaf")
    want = np.concatenate([oracle(flat[:, :28], 0.4), oracle(flat[:, 28:], 0.4)])
    np.testing.assert_allclose(ravel(got), want, rtol=1e-3, atol=1e-4)
    double = merging.pcb(taus, density=0.4, scope="leaf", weights=[2.0, 2.0, 2.0])
    np.testing.assert_allclose(ravel(double), 2 * ravel(got), rtol=1e-5)


def test_equal_zero_opposite_and_tiny_leaves_are_no_nan():
    level = {"w": jnp.full((2, 3), 2.0), "s": jnp.full(2, 2.0)}
    got = merging.pcb(level)
    assert got["w"].tolist() == [2.0] * 3 and float(got["s"]) == 2.0
    assert not merging.pcb({"w": jnp.zeros((2, 3))})["w"].any()
    x = jnp.array([1.0, -2.0, 3.0])
    opposite = merging.pcb({"w": jnp.stack([x, -x])}, density=1.0)["w"]
    np.testing.assert_allclose(opposite, 0, atol=1e-6)
    # Two entries are not clipped to the smaller.
    two = merging.pcb({"w": jnp.array([[1.0, 3.0]])}, density=0.5)["w"]
    assert two.tolist() == [0.0, 3.0]
    one = merging.pcb({"w": jnp.array([[5.0]])})["w"]
    assert one.tolist() == [5.0]


def test_order_dtypes_and_jit():
    _, taus = draw(2)
    base = ravel(merging.pcb(taus))
    back = ravel(merging.pcb(jax.tree.map(lambda x: x[::-1], taus)))
    np.testing.assert_allclose(back, base, rtol=1e-4, atol=1e-6)
    mixed = {
        "a": taus["a"].astype(jnp.bfloat16),
        "n": jnp.ones((3, 2), jnp.int32),
        "e": jnp.zeros((3, 0)),
    }
    got = jax.jit(merging.pcb)(mixed)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(
        lambda v: (v.shape[1:], v.dtype), mixed
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density is 0.0, wanted 0 < density <= 1"),
        ({"density": "x"}, "density is 'x', wanted a number"),
        ({"clip": 0.5}, "clip is 0.5, wanted 0 <= clip < 0.5"),
        ({"scope": "row"}, "scope is 'row'"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"pcb: {message}"):
        merging.pcb({"w": jnp.ones((2, 3))}, **options)
