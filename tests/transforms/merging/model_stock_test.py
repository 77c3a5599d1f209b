"""Model Stock against its formula in float64, and where that divides by zero."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(x, axes, clip=True):
    """x: [T, ...] float64, vectors along axes."""
    count = len(x)
    cosines = []
    for s in range(count):
        for t in range(s):
            dot = (x[s] * x[t]).sum(axes, keepdims=True)
            norms = [np.sqrt((x[i] ** 2).sum(axes, keepdims=True)) for i in (s, t)]
            product = norms[0] * norms[1]
            cosines.append(
                np.divide(dot, product, np.zeros_like(dot), where=product > 0)
            )
    cosine = np.mean(cosines, 0)
    cosine = np.maximum(cosine, 0) if clip else cosine
    return count * cosine / (1 + (count - 1) * cosine) * x.mean(0)


def draw(seed, count, shared=1.0):
    rng = np.random.default_rng(seed)
    return {
        "k": rng.normal(size=(count, 3, 4)) + shared * rng.normal(size=(3, 4)),
        "b": rng.normal(size=(count, 5)) + shared,
    }


def as_jax(taus, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), taus)


@pytest.mark.parametrize("scope", ["leaf", "row"])
@pytest.mark.parametrize("clip", [True, False])
@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=8)
def test_matches_the_formula(scope, clip, seed):
    taus = draw(seed, 3)
    got = merging.model_stock(as_jax(taus), scope=scope, clip=clip)
    for name, axes in {"k": (0, 1) if scope == "leaf" else (1,), "b": (0,)}.items():
        want = oracle(taus[name], axes, clip)
        scale = np.abs(want).max() + 1
        np.testing.assert_allclose(got[name] / scale, want / scale, rtol=0, atol=2e-5)


def test_rows_along_another_axis():
    taus = draw(0, 2)
    got = merging.model_stock(
        as_jax(taus), scope="row", axis=lambda p: -2 * (p == "k") or -1
    )
    np.testing.assert_allclose(got["k"], oracle(taus["k"], (0,)), rtol=1e-5, atol=1e-6)


def test_equal_opposite_zero_and_single():
    x = jnp.array([1.0, -2.0, 3.0])
    same = merging.model_stock({"w": jnp.stack([x, x])})["w"]
    np.testing.assert_allclose(same, x, rtol=1e-6)
    for clip in (True, False):
        away = merging.model_stock({"w": jnp.stack([x, -x])}, clip=clip)["w"]
        assert away.tolist() == [0.0] * 3
        zero = merging.model_stock(
            {"w": jnp.zeros((3, 2)), "s": jnp.zeros(3)}, clip=clip
        )
        assert zero["w"].tolist() == [0.0, 0.0] and float(zero["s"]) == 0
    one = merging.model_stock({"w": x[None], "n": jnp.ones((1, 2), jnp.int32)})
    assert one["w"].tolist() == x.tolist() and one["n"].tolist() == [1, 1]


def test_the_edge_where_the_divisor_is_zero():
    # Three unit vectors at 120 degrees: the mean cosine is -1/2 = -1/(N - 1).
    angle = 2 * np.pi * np.arange(3) / 3
    taus = {"w": jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)}
    for clip in (True, False):
        got = merging.model_stock(taus, clip=clip)["w"]
        np.testing.assert_allclose(got, 0, atol=1e-6)


def test_a_negative_ratio_only_when_asked_for():
    taus = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    assert merging.model_stock(taus)["w"].tolist() == [0.0, 0.0]
    mean = np.array([0.25, 0.5])
    assert float(merging.model_stock(taus, clip=False)["w"] @ mean) < 0


def test_order_scale_dtype_and_jit():
    taus = as_jax(draw(1, 3))
    base = merging.model_stock(taus)
    back = merging.model_stock(jax.tree.map(lambda x: x[::-1], taus))
    tiny = merging.model_stock(jax.tree.map(lambda x: x * 2.0**-80, taus))
    jitted = jax.jit(merging.model_stock)(taus)
    for name in base:
        np.testing.assert_allclose(back[name], base[name], rtol=1e-5)
        np.testing.assert_allclose(tiny[name] * 2.0**80, base[name], rtol=1e-5)
        np.testing.assert_allclose(jitted[name], base[name], rtol=1e-6)
    narrow = merging.model_stock(as_jax(taus, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_weights_are_of_the_average():
    taus = as_jax(draw(2, 2))
    got = merging.model_stock(taus, weights=[3.0, 1.0])["b"]
    ratio = merging.model_stock(taus)["b"] / taus["b"].mean(0)
    want = ratio * (0.75 * taus["b"][0] + 0.25 * taus["b"][1])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_refuses_by_name():
    with pytest.raises(ValueError, match="model_stock: scope is 'global', wanted one"):
        merging.model_stock({"w": jnp.ones((2, 3))}, scope="global")
    with pytest.raises(ValueError, match="model_stock: axis of 'w' is -2, wanted one"):
        merging.model_stock({"w": jnp.ones((2, 3))}, scope="row", axis=-2)
    with pytest.raises(ValueError, match="model_stock: 'w' is complex"):
        merging.model_stock({"w": jnp.ones((2, 3), jnp.complex64)})
