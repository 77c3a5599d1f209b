"""Pareto weight-ensembling: preferences, and the linear program of exact optima."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, routing, tree

pytestmark = pytest.mark.fast
T = 3


def draw(seed):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    base = {"a": part(4, 4), "b": part(4, 2)}
    return base, jax.tree.map(lambda x: part(T, *x.shape), base), part(5, 4)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def linear(kernel, bias=0.0):
    return {"kernel": jnp.asarray(kernel), "bias": jnp.full(T, bias, jnp.float32)}


def test_preferences_that_pass_through_are_coefficients():
    base, taus, x = draw(0)
    model = routing.upscale(base, taus, {"all": "a|b"})
    apply = routing.pwe(apply_fn)
    routers = {"all": linear(jnp.eye(T))}
    for ray in (np.eye(T)[1], np.full(T, 1 / T)):
        ray = jnp.asarray(ray, jnp.float32)
        want = tree.add_scaled(base, merging.task_arithmetic(taus, weights=ray))
        got = apply(routers, model, ray, x)
        np.testing.assert_allclose(got, apply_fn(want, x), atol=1e-4)


def test_groups_have_routers_of_their_own_and_gradients_reach_them_alone():
    base, taus, x = draw(1)
    groups = {"low": "a", "high": "b"}
    model = routing.upscale(base, taus, groups, static_scale=0.0)
    routers = routing.init_routers(
        jax.random.key(0), groups, T, T, hidden=2 * T, std=1.0
    )
    apply, ray = routing.pwe(apply_fn), jnp.array([0.2, 0.3, 0.5])
    gates = {name: routing.router(params, ray) for name, params in routers.items()}
    want = apply_fn(routing.gated(model, gates), x)
    np.testing.assert_allclose(apply(routers, model, ray, x), want, atol=1e-5)

    def loss(routers, model):
        return (apply(routers, model, ray, x) ** 2).sum()

    own, others = jax.grad(loss, (0, 1))(routers, model)
    assert own["low"]["bias"].any() and own["high"]["kernel"].any()
    assert not any(g.any() for g in jax.tree.leaves(others))


def test_rays_and_grids_lie_on_the_simplex():
    rays = routing.dirichlet_rays(jax.random.key(0), T, 200, alpha=0.3)
    np.testing.assert_allclose(rays.sum(1), 1, atol=1e-5)
    assert (np.asarray(rays) >= 0).all()
    np.testing.assert_allclose(rays.mean(0), 1 / T, atol=0.1)
    grid = routing.simplex_grid(T, 5)
    assert len(grid) == 15 and len({tuple(row) for row in grid}) == 15
    np.testing.assert_allclose(grid.sum(1), 1, atol=1e-6)
    assert routing.simplex_grid(1, 2).tolist() == [[1.0]]


def program(gram, losses, ray, eps=1e-4):
    """The same linear program for SciPy."""
    count = len(losses)
    gram = gram / np.abs(gram).max()
    share = ray * losses / (ray * losses).sum()
    logs = np.log(count * share)
    off = (share * logs).sum()
    pull = gram @ (ray * (logs - off))
    if off > eps:
        lower = np.where(pull > 0, -np.inf, pull) if (pull > 0).any() else 0 * pull
        lower[ray * losses == (ray * losses).max()] = 0
        return pull, gram, lower
    rows = np.concatenate([gram, pull[None]])
    return gram.sum(1), rows, np.append(0 * pull, min(0, pull.max()))


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_weights_solve_the_linear_program(seed):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(T, 6))
    gram, losses = grads @ grads.T, rng.uniform(0.1, 2, T)
    ray = rng.dirichlet(np.ones(T))
    if seed % 3 == 0:  # On the ray already.
        losses = 1 / ray
    got = np.asarray(SOLVE(*(jnp.asarray(x, jnp.float32) for x in (gram, losses, ray))))
    np.testing.assert_allclose(got.sum(), 1, atol=1e-5)
    assert (got >= 0).all()
    goal, rows, lower = program(gram, losses, ray)
    keep = np.isfinite(lower)
    found = optimize.linprog(
        -goal,
        A_ub=-rows[keep],
        b_ub=-lower[keep],
        A_eq=np.ones((1, T)),
        b_eq=[1.0],
    )
    if found.status != 0:
        np.testing.assert_allclose(got, ray, atol=1e-5)
        return
    assert (rows[keep] @ got - lower[keep] >= -1e-3).all()
    assert goal @ got >= -found.fun - 1e-3


SOLVE = jax.jit(routing.epo_weights)


def test_following_them_ends_on_the_ray():
    """Two parabolas whose front is known: losses become inverse to the preference."""
    goals = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    ray = jnp.array([0.8, 0.2])

    def losses(x):
        return jnp.sum((x[None] - goals) ** 2, -1)

    @jax.jit
    def step(x):
        grads = jax.jacobian(losses)(x)
        weights = routing.epo_weights(grads @ grads.T, losses(x), ray)
        return x - 0.02 * weights @ grads

    x = jax.lax.fori_loop(0, 600, lambda _, x: step(x), jnp.array([-0.5, 0.7]))
    np.testing.assert_allclose(x[1], 0, atol=0.02)  # On the front.
    weighted = ray * losses(x)
    np.testing.assert_allclose(weighted[0], weighted[1], rtol=0.15)


def test_refuses_by_name():
    with pytest.raises(ValueError, match="dirichlet_rays: alpha is 0"):
        routing.dirichlet_rays(jax.random.key(0), T, 2, alpha=0)
    with pytest.raises(ValueError, match="simplex_grid: tasks is 2, points 1"):
        routing.simplex_grid(2, 1)
    with pytest.raises(ValueError, match="epo_weights: gram, losses and preference"):
        routing.epo_weights(jnp.eye(3), jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="at most 8 tasks"):
        routing.epo_weights(jnp.eye(9), jnp.ones(9), jnp.ones(9))
    base, taus, x = draw(2)
    model = routing.upscale(base, taus, {"all": "a"})
    with pytest.raises(ValueError, match=r"router: features are \(2,\), wanted"):
        routing.pwe(apply_fn)({"all": linear(jnp.eye(T))}, model, jnp.ones(2), x)
