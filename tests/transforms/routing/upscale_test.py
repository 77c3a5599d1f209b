"""Upscaled models: what is merged, what waits for gates, and what gates make of it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import routing, tree

pytestmark = pytest.mark.fast
T = 3
GROUPS = {"lower": "^lower/", "upper": "^upper/kernel$"}


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def model(*lead):
        return {
            "lower": {"bias": part(*lead, 4), "kernel": part(*lead, 3, 4)},
            "step": jnp.zeros(lead, jnp.int32),
            "upper": {"bias": part(*lead, 2), "kernel": part(*lead, 4, 2)},
        }

    return model(), model(T)


def expert(base, taus, t):
    delta = jax.tree.map(lambda x: x[t], taus)
    return tree.add_scaled(base, delta)


def close(x, y, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), x, y)


def test_static_leaves_are_task_arithmetic_and_routed_ones_wait():
    base, taus = draw(0)
    model = routing.upscale(base, taus, GROUPS, static_scale=0.4)
    want = base["upper"]["bias"] + 0.4 * taus["upper"]["bias"].sum(0)
    np.testing.assert_allclose(model.params["upper"]["bias"], want, atol=1e-6)
    np.testing.assert_array_equal(model.params["lower"]["bias"], base["lower"]["bias"])
    assert model.params["step"].dtype == jnp.int32
    assert set(model.experts["lower"]) == {"lower/bias", "lower/kernel"}
    assert set(model.experts["upper"]) == {"upper/kernel"}


def test_one_hot_gates_are_the_expert_and_equal_ones_the_average():
    base, taus = draw(1)
    everything = {"all": "lower|upper"}
    model = routing.upscale(base, taus, everything)
    for t in range(T):
        close(routing.gated(model, jnp.eye(T)[t]), expert(base, taus, t))
    mean = jax.tree.map(lambda x: x.mean(0) if tree.is_inexact(x) else x[0], taus)
    close(routing.gated(model, jnp.full(T, 1 / T)), tree.add_scaled(base, mean))
    # Gates of the static strength: plain task arithmetic everywhere.
    model = routing.upscale(base, taus, GROUPS, static_scale=0.3)
    total = jax.tree.map(lambda x: x.sum(0) if tree.is_inexact(x) else x[0], taus)
    close(routing.gated(model, jnp.full(T, 0.3)), tree.add_scaled(base, total, 0.3))


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_every_router_has_gates_of_its_own(seed):
    base, taus = draw(2)
    gates = np.random.default_rng(seed).normal(size=(2, T)).astype(np.float32)
    model = routing.upscale(base, taus, GROUPS, static_scale=0.0)
    own = {"lower": jnp.asarray(gates[0]), "upper": jnp.asarray(gates[1])}
    found = routing.gated(model, own)
    for group, row in (("lower", gates[0]), ("upper", gates[1])):
        x = np.asarray(taus[group]["kernel"], np.float64)
        want = base[group]["kernel"] + np.tensordot(row, x, 1)
        np.testing.assert_allclose(found[group]["kernel"], want, atol=1e-4)
    np.testing.assert_array_equal(found["upper"]["bias"], base["upper"]["bias"])


def test_density_prunes_routed_task_vectors_leaf_by_leaf():
    base, taus = draw(3)
    model = routing.upscale(base, taus, GROUPS, density=0.25)
    x, full = model.experts["lower"]["lower/kernel"], taus["lower"]["kernel"]
    for t in range(T):
        kept = np.asarray(x[t]) != 0
        assert kept.sum() == 3
        least = np.abs(full[t])[kept].min()
        assert least >= np.abs(full[t])[~kept].max()
        np.testing.assert_array_equal(x[t][kept], full[t][kept])


def test_dtypes_and_one_rounding():
    base, taus = draw(4, jnp.bfloat16)
    model = routing.upscale(base, taus, GROUPS)
    found = routing.gated(model, jnp.full(T, 1 / 3))["lower"]["kernel"]
    assert found.dtype == jnp.bfloat16
    wide = [np.asarray(x["lower"]["kernel"], np.float32) for x in (base, taus)]
    want = jnp.asarray(wide[0] + wide[1].sum(0) / 3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, want)


def test_per_example_is_a_loop():
    base, taus = draw(5)
    model = routing.upscale(base, taus, {"all": "lower|upper"})

    def apply_fn(params, x):
        inner = jnp.tanh(x @ params["lower"]["kernel"])
        return inner @ params["upper"]["kernel"]

    rng = np.random.default_rng(6)
    x, gates = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    got = routing.per_example(apply_fn, lambda g: routing.gated(model, g))(gates, x)
    for b in range(5):
        want = apply_fn(routing.gated(model, gates[b]), x[b : b + 1])[0]
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_refuses_by_name():
    base, taus = draw(7)
    with pytest.raises(
        ValueError, match="upscale: 'mlp' of 'x' finds no floating leaf"
    ):
        routing.upscale(base, taus, {"x": "mlp"})
    with pytest.raises(ValueError, match="'lower/bias' is routed by both 'x' and 'y'"):
        routing.upscale(base, taus, {"x": "lower", "y": "bias"})
    with pytest.raises(ValueError, match="upscale: groups are empty"):
        routing.upscale(base, taus, {})
    bad = jax.tree.map(lambda x: x * jnp.nan if tree.is_inexact(x) else x, taus)
    with pytest.raises(ValueError, match="upscale: 'lower/bias' holds NaN"):
        routing.upscale(base, bad, GROUPS)
    with pytest.raises(ValueError, match="lower/kernel"):
        wrong = {**taus, "lower": {**taus["lower"], "kernel": jnp.ones((T, 3, 5))}}
        routing.upscale(base, wrong, GROUPS)
    model = routing.upscale(base, taus, GROUPS)
    with pytest.raises(ValueError, match=r"gated: gates are of \['lower'\]"):
        routing.gated(model, {"lower": jnp.ones(T)})
    with pytest.raises(ValueError, match=r"\(2,\), wanted \(3,\)"):
        routing.gated(model, jnp.ones(2))
