"""SCE against its definition in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(x, density, weights, floor=0.0):
    """One leaf [T, n] float64: select, calculate, erase."""
    if density < 1 and len(x) > 1:
        variance = np.where((x == x[0]).all(0), 0, x.var(0))
        kept = int(np.count_nonzero(variance) * density + 1e-9)
        mask = np.zeros(x.shape[1])
        mask[np.argsort(-variance, kind="stable")[:kept]] = 1
        x = x * mask
    squares = (x**2).mean(1)
    total = squares.sum()
    share = np.full(len(x), 1 / len(x)) if total <= floor else squares / total
    share = share * weights
    agrees = (np.sign(x) == np.sign(x.sum(0))) & (x != 0)
    below = (share[:, None] * agrees).sum(0)
    above = (share[:, None] * x * agrees).sum(0)
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0)


def draw(seed, count=3, size=(3, 7)):
    return np.random.default_rng(seed).normal(size=(count, *size))


def merge(x, **options):
    return merging.sce({"w": jnp.asarray(x, jnp.float32)}, **options)["w"]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.55, 1.0])
@hypothesis.given(st.integers(0, 2**31 - 1), st.booleans())
@hypothesis.settings(max_examples=10)
def test_matches_the_definition(density, seed, weighted):
    x = draw(seed)
    weights = np.array([1.0, 2.0, 0.5]) if weighted else np.ones(3)
    want = oracle(x.reshape(3, -1), density, weights).reshape(3, 7)
    got = merge(x, density=density, weights=weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_only_entries_that_differ_are_counted():
    x = np.array([[1.0, 1.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, -1.0, 1.0]])
    got = merge(x, density=0.5)
    assert np.flatnonzero(got).tolist() == [3]
    # 0.29 of 100 entries are 29, though not in floating point.
    wide = draw(0, 2, (100,))
    assert np.count_nonzero(merge(wide, density=0.29)) == 29


def test_small_changes_are_weighed_like_large_ones():
    x = draw(1)
    np.testing.assert_allclose(merge(1e-4 * x), 1e-4 * merge(x), rtol=1e-5, atol=1e-9)
    want = oracle(1e-4 * x.reshape(3, -1), 1.0, np.ones(3), 1e-6).reshape(3, 7)
    got = merge(1e-4 * x, floor=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
    assert not np.allclose(got, merge(1e-4 * x), rtol=1e-2, atol=0)


def test_one_zero_opposite_and_equal_tasks():
    x = draw(2)
    np.testing.assert_allclose(merge(x[:1], density=0.3), x[0], rtol=1e-6)
    np.testing.assert_allclose(merge(np.stack([x[0]] * 3)), x[0], rtol=1e-6)
    assert not merge(np.stack([x[0]] * 3), density=0.9).any()
    assert not merge(np.stack([x[0], -x[0]])).any()
    assert not merge(0 * x, density=0.5).any()


def test_order_dtypes_and_jit():
    x = draw(3)
    base = merge(x, density=0.4)
    np.testing.assert_allclose(merge(x[::-1], density=0.4), base, rtol=1e-5, atol=1e-7)
    jitted = jax.jit(lambda x: merging.sce({"w": x}, density=0.4)["w"])
    np.testing.assert_allclose(jitted(jnp.asarray(x, jnp.float32)), base, rtol=1e-6)
    pair = jnp.asarray(np.stack([x, x[::-1]]), jnp.float32)
    both = jax.vmap(lambda v: merging.sce({"w": v})["w"])(pair)
    np.testing.assert_allclose(both[0], merge(x), rtol=1e-6)
    taus = {
        "w": jnp.asarray(x, jnp.bfloat16),
        "n": jnp.ones((3, 2), jnp.int32),
        "e": jnp.zeros((3, 0)),
        "s": jnp.ones(3),
    }
    got = merging.sce(taus)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(
        lambda v: (v.shape[1:], v.dtype), taus
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density is 1.5, wanted 0 <= density <= 1"),
        ({"floor": -1.0}, "floor is -1.0, wanted 0 or more"),
        ({"weights": [1.0, 0.0]}, "weights are .* wanted all of them positive"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"sce: {message}"):
        merging.sce({"w": jnp.ones((2, 3))}, **options)
