"""Experts of rank one: what they add up to, and what a selection leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, routing, tree

pytestmark = pytest.mark.fast
T, M, N = 3, 6, 4


def draw(seed=0):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def model(*lead):
        return {
            "mlp": {"kernel": part(*lead, M, N), "bias": part(*lead, N)},
            "rest": part(*lead, 5),
        }

    return model(), model(T)


def test_all_of_the_rank_is_the_task_vector():
    base, taus = draw()
    model = routing.rank_one(base, taus, {"mlp": "^mlp/"}, rank=N, static_scale=0.4)
    merged = tree.add_scaled(base, merging.task_arithmetic(taus), 0.4)
    for name in ("mlp/bias", "rest"):
        found = dict(zip(tree.paths(merged), jax.tree.leaves(merged), strict=True))
        own = dict(
            zip(tree.paths(model.params), jax.tree.leaves(model.params), strict=True)
        )
        np.testing.assert_allclose(own[name], found[name], atol=1e-6)
    np.testing.assert_array_equal(model.params["mlp"]["kernel"], base["mlp"]["kernel"])
    for t in range(T):
        gates = jnp.repeat(jnp.eye(T)[t], N)
        got = routing.gated(model, {"mlp": gates})["mlp"]["kernel"]
        want = base["mlp"]["kernel"] + taus["mlp"]["kernel"][t]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_every_gate_has_its_singular_triplet():
    base, taus = draw(1)
    model = routing.rank_one(base, taus, {"mlp": "^mlp/"}, rank=2)
    gates = np.random.default_rng(2).normal(size=2 * T)
    delta = 0
    for t in range(T):
        u, s, vt = np.linalg.svd(np.asarray(taus["mlp"]["kernel"][t], np.float64))
        for k in range(2):
            delta = delta + gates[2 * t + k] * s[k] * np.outer(u[:, k], vt[k])
    got = routing.gated(model, {"mlp": jnp.asarray(gates, jnp.float32)})
    np.testing.assert_allclose(
        got["mlp"]["kernel"] - base["mlp"]["kernel"], delta, atol=1e-5
    )


def test_routed_by_inputs_with_a_selection_and_slopes():
    base, taus = draw(3)
    model = routing.rank_one(base, taus, {"mlp": "^mlp/"}, rank=2)
    routers = {"mlp": routing.init_router(jax.random.key(0), M, 2 * T, std=1.0)}
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, M)), jnp.float32)

    def apply_fn(params, x):
        return x @ params["mlp"]["kernel"] + params["mlp"]["bias"][None]

    apply = jax.jit(routing.we_moe(apply_fn, lambda params, x: x, select=2))
    got = apply(routers, model, x)
    gates = routing.soft_top(routing.router(routers["mlp"], x), 2)
    for b in range(5):
        params = routing.gated(model, {"mlp": gates[b]})
        np.testing.assert_allclose(got[b], apply_fn(params, x[b : b + 1])[0], atol=1e-5)
    slopes = jax.grad(lambda r: apply(r, model, x).sum())(routers)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_soft_top_is_close_to_the_largest():
    gates = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
    got = np.asarray(routing.soft_top(gates, 3))
    order = np.sort(gates, -1)
    large = np.asarray(gates) > order[:, -3:-2] + 0.1
    small = np.asarray(gates) < order[:, -3:-2] - 0.1
    np.testing.assert_allclose(got[large], np.asarray(gates)[large], rtol=1e-3)
    np.testing.assert_allclose(got[small], 0, atol=1e-3)
    with pytest.raises(ValueError, match="soft_top: count is 8, wanted 1 to 7"):
        routing.soft_top(gates, 8)


def test_dtypes_and_errors():
    base, taus = draw(5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (base, taus))
    model = routing.rank_one(*half, {"mlp": "^mlp/"}, rank=1)
    assert model.experts["mlp"]["mlp/kernel"].a.dtype == jnp.bfloat16
    params = routing.gated(model, jnp.zeros(T))
    assert params["mlp"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="rank_one: rank is 0"):
        routing.rank_one(base, taus, {"mlp": "^mlp/"}, rank=0)
    with pytest.raises(ValueError, match="rank_one: rank is 5, 'mlp/kernel' has at mo"):
        routing.rank_one(base, taus, {"mlp": "^mlp/"}, rank=5)
    with pytest.raises(ValueError, match="rank_one: 'rest' of 'r' finds no matrix"):
        routing.rank_one(base, taus, {"r": "rest"}, rank=1)
    with pytest.raises(ValueError, match=r"gated: gates are \(2,\), wanted \(3,\)"):
        routing.gated(model, jnp.zeros(2))
