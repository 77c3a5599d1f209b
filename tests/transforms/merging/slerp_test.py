"""SLERP against the great circle in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree

pytestmark = pytest.mark.fast


def oracle(a, b, t, linear_above=0.9995):
    """Two float64 vectors."""
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    if na == 0 or nb == 0:
        return (1 - t) * a + t * b
    cosine = np.clip(a @ b / (na * nb), -1, 1)
    if abs(cosine) > linear_above or 1 - abs(cosine) < 1e-14:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def draw(seed, near=0.0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(3, 4))
    return np.stack([base, (1 - near) * rng.normal(size=(3, 4)) + near * base])


def merge(x, t, **options):
    experts = {"w": jnp.asarray(x, jnp.float32)}
    return merging.slerp(experts, weights=[1 - t, t], **options)["w"]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("near", [0.0, 0.9, 0.99, 0.999])
def test_matches_the_great_circle(t, near):
    x = draw(0, near)
    for bound in (0.9995, 1.0):
        want = oracle(x[0].ravel(), x[1].ravel(), t, bound).reshape(3, 4)
        got = merge(x, t, linear_above=bound)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("axis", [-1, -2])
def test_rows_are_vectors_of_their_own(axis):
    x = draw(1)
    got = merge(x, 0.25, scope="row", axis=axis)
    rows = np.moveaxis(x, axis, -1)
    want = [oracle(a, b, 0.25) for a, b in zip(rows[0], rows[1], strict=True)]
    want = np.moveaxis(np.array(want), -1, axis)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_equal_lengths_stay_on_the_sphere():
    x = draw(2)
    x /= np.linalg.norm(x, axis=(1, 2), keepdims=True)
    for t in (0.2, 0.7):
        np.testing.assert_allclose(np.linalg.norm(merge(x, t)), 1, rtol=1e-5)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_colinear_opposite_and_zero_vectors_are_linear(t):
    a = draw(3)[0]
    for b in (a, 2 * a, -a, -3 * a, 0 * a):
        got = merge(np.stack([a, b]), t, linear_above=1.0)
        np.testing.assert_allclose(got, (1 - t) * a + t * b, rtol=1e-5, atol=1e-6)


def test_swapping_the_models_and_the_weights():
    x = draw(4)
    np.testing.assert_allclose(merge(x, 0.2), merge(x[::-1], 0.8), rtol=1e-5, atol=1e-6)


def test_task_vectors_turn_around_the_base():
    base = {"w": jnp.asarray(draw(5)[0], jnp.float32)}
    taus = {"w": jnp.asarray(draw(6), jnp.float32)}
    delta = merging.slerp(taus)
    want = oracle(*(np.asarray(v, np.float64).ravel() for v in taus["w"]), 0.5)
    got = tree.add_scaled(base, delta)["w"] - base["w"]
    np.testing.assert_allclose(np.ravel(got), want, rtol=2e-5, atol=2e-5)


def test_structure_dtype_scale_jit_and_one_model():
    x = jnp.asarray(draw(7), jnp.bfloat16)
    experts = {"w": x, "s": x[:, 0, 0], "e": x[:, :0], "n": jnp.ones((2, 3), jnp.int32)}
    got = merging.slerp(experts)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda v: v.shape[1:], experts)
    assert jax.tree.map(lambda v: v.dtype, got) == jax.tree.map(
        lambda v: v.dtype, experts
    )
    jitted = jax.jit(merging.slerp)(experts)
    np.testing.assert_array_equal(jitted["w"], got["w"])
    wide = x.astype(jnp.float32)
    for factor in (2.0**-90, 2.0**60):
        far = merging.slerp({"w": wide * factor})["w"] / factor
        np.testing.assert_allclose(far, merging.slerp({"w": wide})["w"], rtol=1e-5)
    one = merging.slerp({"w": wide[:1]})["w"]
    np.testing.assert_array_equal(one, wide[0])


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, "there are 3 models, wanted 2"),
        (2, {"weights": [1.0, -1.0]}, "weights are .* wanted a sum other than 0"),
        (2, {"linear_above": 1.5}, "linear_above is 1.5"),
        (2, {"linear_above": "x"}, "linear_above is 'x', wanted a number"),
        (2, {"scope": "column"}, "scope is 'column'"),
    ],
)
def test_refuses_by_name(count, options, message):
    with pytest.raises(ValueError, match=f"slerp: {message}"):
        merging.slerp({"w": jnp.ones((count, 3))}, **options)
