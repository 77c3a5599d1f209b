"""CMA-ES: the evaluations that it needs, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def minimise(loss, start, seed=0, generations=200, **options):
    """Loss of the best after each generation, the state, and the search."""
    search = merging.cma_es(start, **options)

    def turn(state, key):
        found = search.ask(key, state)
        state = search.tell(state, found, jax.vmap(loss)(found))
        return state, state.best_loss

    keys = jax.random.split(jax.random.key(seed), generations)
    state, losses = jax.jit(lambda s: jax.lax.scan(turn, s, keys))(search.init())
    return np.asarray(losses), state, search


def sphere(x):
    return jnp.sum(x**2)


def ellipsoid(x):
    return jnp.sum(10.0 ** jnp.linspace(0.0, 4.0, x.size) * x**2)


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.parametrize(
    ("loss", "generations", "std"),
    [(sphere, 90, 0.5), (ellipsoid, 230, 0.5), (rosenbrock, 420, 0.3)],
)
def test_reaches_the_optimum_in_the_evaluations_that_are_usual(loss, generations, std):
    # pycma takes 70, 160 and 315 generations of 10 candidates (medians of 7 seeds).
    reached = []
    for seed in range(3):
        losses, _, _ = minimise(loss, jnp.full(8, 0.1), seed, generations, std=std)
        reached.append(losses[-1])
    assert np.median(reached) < 1e-6, reached


def test_a_turned_problem_is_as_easy_and_the_shape_is_learned():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    turn = jnp.asarray(turn, jnp.float32)

    def turned(x):
        return ellipsoid(turn @ x)

    _, state, _ = minimise(turned, jnp.ones(6), generations=170)
    assert state.best_loss < 1e-5
    inner = turn @ state.cov @ turn.T
    assert inner[0, 0] / inner[-1, -1] > 300


def test_depends_on_the_order_of_losses_alone():
    def steps(loss):
        return minimise(loss, jnp.ones(4), generations=10)[1].mean

    np.testing.assert_array_equal(
        steps(sphere), steps(lambda x: jnp.exp(sphere(x)) + 5)
    )


def test_nan_is_the_worst():
    def loss(x):
        return jnp.where(x[0] > 1.0, jnp.nan, jnp.sum((x - 0.8) ** 2))

    losses, state, search = minimise(loss, jnp.zeros(3), generations=80)
    assert losses[-1] < 1e-6
    np.testing.assert_allclose(search.best(state), 0.8, atol=1e-3)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_trees_dtypes_and_first_candidates():
    start = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.ones((), jnp.float32)}
    search = merging.cma_es(start, std=0.1, population=500)
    state = search.init()
    best = search.best(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), best) == jax.tree.map(
        lambda x: (x.shape, x.dtype), start
    )
    found = search.ask(jax.random.key(0), state)
    assert found["a"].shape == (500, 2, 3)
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["b"].mean(), 1, atol=0.02)
    np.testing.assert_allclose(found["b"].std(), 0.1, rtol=0.1)
    one = merging.cma_es(jnp.zeros(1))
    assert one.population == 4
    after = one.tell(one.init(), one.ask(jax.random.key(0), one.init()), jnp.arange(4))
    assert int(after.generation) == 1


def test_finds_the_coefficients_of_a_merge():
    taus = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 20)), "f4")}
    wanted = merging.combine(taus, jnp.array([0.2, 0.9, -0.3]))["w"]

    def loss(weights):
        return jnp.sum((merging.combine(taus, weights)["w"] - wanted) ** 2)

    _, state, search = minimise(loss, jnp.full(3, 0.3), generations=80)
    np.testing.assert_allclose(search.best(state), [0.2, 0.9, -0.3], atol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match="cma_es: 'n' is int32, wanted a float"):
        merging.cma_es({"n": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="cma_es: start has no variables"):
        merging.cma_es({})
    with pytest.raises(ValueError, match="cma_es: std is 0.0, wanted above 0"):
        merging.cma_es(jnp.zeros(2), std=0.0)
    with pytest.raises(ValueError, match="cma_es: population is 1, wanted at least 2"):
        merging.cma_es(jnp.zeros(2), population=1)
    with pytest.raises(ValueError, match="cma_es"):
        merging.cma_es(jnp.array([1.0, jnp.nan]))
    search = merging.cma_es(jnp.zeros(2))
    state = search.init()
    found = search.ask(jax.random.key(0), state)
    with pytest.raises(ValueError, match=r"tell: losses are \(3,\), wanted \(6,\)"):
        search.tell(state, found, jnp.zeros(3))
    with pytest.raises(ValueError, match="cma_es: tell: .* in candidates"):
        search.tell(state, found[:3], jnp.zeros(6))
