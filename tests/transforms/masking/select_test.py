import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms import masking


def parameters(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    # Rounded, so that equal magnitudes are common.
    return {
        "a": jnp.asarray(np.round(rng.normal(size=(3, 7)), 1), dtype),
        "b": [jnp.asarray(np.round(rng.normal(size=10), 1), dtype), jnp.zeros((0, 2))],
        "c": jnp.asarray(rng.normal(), dtype),
    }


def top(x, k):
    """Oracle: stable sort, largest first."""
    order = np.argsort(-np.abs(np.asarray(x, np.float64)).reshape(-1), kind="stable")
    mask = np.zeros(order.size, bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("density", [0, 0.29, 0.5, 1])
def test_magnitude_keeps_the_largest_and_the_exact_count(density, dtype):
    params = parameters(1, dtype)
    got = masking.magnitude(params, density)
    for x, m in zip(jax.tree.leaves(params), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(m, top(x, math.floor(density * x.size + 1e-9)))
    rows = masking.magnitude(params, density, "row")["a"]
    k = math.floor(density * 7 + 1e-9)
    want = np.stack([top(row, k) for row in params["a"]])
    np.testing.assert_array_equal(rows, want)


@hypothesis.given(st.integers(0, 99), st.floats(0, 1))
@hypothesis.settings(max_examples=5)
def test_global_scope_is_the_flat_definition(seed, density):
    params = parameters(seed)
    leaves = jax.tree.leaves(params)
    flat = np.concatenate([np.asarray(x).reshape(-1) for x in leaves])
    got = masking.magnitude(params, density, "global")
    got = np.concatenate([np.asarray(m).reshape(-1) for m in jax.tree.leaves(got)])
    count = math.floor(Fraction(str(density)) * flat.size)
    np.testing.assert_array_equal(got, top(flat, count))


@pytest.mark.fast
@pytest.mark.parametrize("scope", ["leaf", "row", "global"])
def test_a_density_just_below_one_entry_keeps_none(scope):
    mask = masking.magnitude({"w": jnp.ones(100)}, 0.0099999999, scope)
    assert not mask["w"].any()


@pytest.mark.parametrize("scope", ["leaf", "row", "global"])
def test_random_has_the_exact_count_and_every_entry_its_chance(scope):
    shapes = {
        "w": jax.ShapeDtypeStruct((4, 10), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((5,), jnp.float32),
    }

    @jax.jit
    @jax.vmap
    def draw(key):
        return masking.random(key, shapes, 0.4, scope)

    masks = draw(jax.random.split(jax.random.key(0), 200))
    counts = {
        name: np.asarray(m).sum(axis=tuple(range(1, m.ndim)))
        for name, m in masks.items()
    }
    if scope == "global":
        assert (counts["w"] + counts["b"] == 18).all()
    else:
        assert (counts["w"] == 16).all() and (counts["b"] == 2).all()
    if scope == "row":
        assert (np.asarray(masks["w"]).sum(-1) == 4).all()
    for m in masks.values():  # 200 draws at 0.4: more than five standard deviations
        np.testing.assert_allclose(np.mean(m, axis=0), 0.4, atol=0.18)


@pytest.mark.fast
def test_density_counts_entries_not_leaves():
    mask = {"a": jnp.ones((2, 3), bool), "b": np.zeros(18, bool)}
    assert float(jax.jit(masking.density)(mask)) == pytest.approx(0.25)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: masking.magnitude(p, 1.2), "magnitude: density is 1.2"),
        (lambda p: masking.magnitude(p, "0.2"), "magnitude: density is '0.2'"),
        (
            lambda p: masking.magnitude(p, 0.5, "tensor"),
            "scope 'tensor' does not exist",
        ),
        (
            lambda p: masking.magnitude({"a": jnp.array([1.0, jnp.nan])}, 0.5),
            "magnitude: 'a' holds NaN",
        ),
        (
            lambda p: masking.magnitude({"n": jnp.arange(3)}, 0.5),
            "magnitude: 'n' is int32",
        ),
        (lambda p: masking.random(jax.random.key(0), p, -1), "random: density is -1"),
        (lambda p: masking.density(p), "density: 'a' is float32"),
        (lambda p: masking.density({"a": True}), "density: 'a' is bool, .* Python"),
        (lambda p: masking.density({}), "no entries"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(parameters())
