"""DAWE: features from outside, one router for all parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses, merging, routing, tree

pytestmark = pytest.mark.fast
T, D, C = 3, 6, 4


def apply_fn(params, x):
    return jnp.tanh(x @ params["body"]) @ params["head"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    base = {"body": part(D, D), "head": part(D, C)}
    return base, jax.tree.map(lambda x: part(T, *x.shape), base), part(5, D)


@pytest.mark.parametrize("per", ["example", "batch"])
def test_constant_gates_are_a_merge_by_leaf(case, per):
    base, taus, x = case
    model = routing.upscale(base, taus, {name: f"^{name}$" for name in base})
    codes = np.random.default_rng(1).normal(size=(T, 2)).astype(np.float32)
    apply = jax.jit(routing.dawe(apply_fn, lambda x: x, per=per))
    got = apply({"bias": jnp.asarray(codes.ravel())}, model, x)
    coeffs = {"body": jnp.asarray(codes[:, 0]), "head": jnp.asarray(codes[:, 1])}
    want = apply_fn(merging.compose(base, taus, coeffs), x)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_each_input_has_its_model_and_slopes_reach_the_router_alone(case):
    base, taus, x = case
    model = routing.upscale(base, taus, {"all": "."})
    router = routing.init_router(jax.random.key(0), D, T, bias=0.2, std=0.5)
    features = lambda x: jnp.sin(x)[:, None]  # noqa: E731
    apply = routing.dawe(apply_fn, features)
    got = apply(router, model, x)
    gates = routing.router(router, jnp.sin(x))
    for b in range(5):
        want = apply_fn(routing.gated(model, gates[b]), x[b : b + 1])
        np.testing.assert_allclose(got[b], want[0], atol=1e-4)
    own, others = jax.grad(lambda r, m: apply(r, m, x).sum(), (0, 1))(router, model)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(own))
    assert not any(jnp.any(g != 0) for g in jax.tree.leaves(others))


def test_learns_without_labels():
    """Inputs say by their sign whose they are; entropy is least at the right expert."""
    rng = np.random.default_rng(2)
    base = {"w": jnp.zeros((2, 2))}
    kernels = np.zeros((2, 2, 2))
    kernels[0, 0], kernels[1, 1] = [4, -4], [-4, 4]
    taus = {"w": jnp.asarray(kernels, jnp.float32)}
    x = np.zeros((2, 64, 2))
    x[0, :, 0], x[1, :, 1] = rng.normal(1, 0.1, 64), rng.normal(1, 0.1, 64)
    x = jnp.asarray(x, jnp.float32)
    model = routing.upscale(base, taus, {"all": "."})
    apply = routing.dawe(lambda p, x: x @ p["w"], lambda x: x)

    def entropy(router, x):
        return losses.softmax_entropy(apply(router, model, x)).mean()

    router = routing.init_router(jax.random.key(0), 2, 2, bias=0.2)
    before = [float(entropy(router, own)) for own in x]
    for _ in range(40):
        slopes = jax.grad(lambda r: entropy(r, x[0]) + entropy(r, x[1]))(router)
        router = jax.tree.map(lambda p, g: p - 0.5 * g, router, slopes)
    after = [float(entropy(router, own)) for own in x]
    assert max(after) < 0.2 * min(before)
    gates = routing.router(router, jnp.eye(2))
    assert gates[0, 0] > 0.5 < gates[1, 1]


def test_one_task_and_errors(case):
    base, taus, x = case
    one = jax.tree.map(lambda t: t[:1], taus)
    model = routing.upscale(base, one, {"all": "."})
    apply = routing.dawe(apply_fn, lambda x: x)
    want = apply_fn(tree.add_scaled(base, jax.tree.map(lambda t: t[0], one)), x)
    np.testing.assert_allclose(apply({"bias": jnp.ones(1)}, model, x), want, atol=1e-4)
    with pytest.raises(ValueError, match="dawe: per is"):
        routing.dawe(apply_fn, lambda x: x, per="token")
    two = routing.upscale(base, taus, {name: f"^{name}$" for name in base})
    with pytest.raises(ValueError, match="dawe: the router has 3 gates, wanted a mult"):
        apply({"bias": jnp.ones(3)}, two, x)
