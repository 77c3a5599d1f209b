"""Twin-Merging: shared and exclusive parts, their compression, and the routed whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, routing, tree

pytestmark = pytest.mark.fast
T, D, C = 3, 5, 4


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def model(*lead):
        return {"kernel": part(*lead, D, C), "bias": part(*lead, C)}

    return model(), model(T)


def one(taus, t):
    return jax.tree.map(lambda x: x[t], taus)


def close(x, y, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), x, y)


@pytest.mark.parametrize("options", [{}, {"rank": C}, {"density": 1.0}])
def test_all_of_it_restores_every_task(options):
    _, taus = draw(0)
    model = routing.twin(taus, **options)
    for t in range(T):
        close(routing.twin_delta(model, jnp.eye(T)[t]), one(taus, t))


def test_no_weights_are_the_shared_model_and_equal_ones_the_average():
    _, taus = draw(1)
    model = routing.twin(taus, scale=0.4)
    total = merging.task_arithmetic(taus)
    close(routing.twin_delta(model, jnp.zeros(T)), tree.add_scaled(total, total, -0.6))
    close(routing.twin_delta(model, jnp.full(T, 1 / T)), merging.average(taus))
    given = routing.twin(taus, shared=merging.ties(taus, density=0.5))
    close(given.shared, merging.ties(taus, density=0.5))
    close(routing.twin_delta(given, jnp.eye(T)[1]), one(taus, 1))


@pytest.mark.parametrize("rank", [1, 2])
def test_exclusive_matrices_are_the_best_of_their_rank(rank):
    _, taus = draw(2)
    model = routing.twin(taus, scale=0.3, rank=rank)
    assert set(model.others) == {"bias"}
    x = np.asarray(taus["kernel"], np.float64)
    shared = 0.3 * x.sum(0)
    for t in range(T):
        u, s, vt = np.linalg.svd(x[t] - shared)
        want = shared + (u[:, :rank] * s[:rank]) @ vt[:rank]
        got = routing.twin_delta(model, jnp.eye(T)[t])
        np.testing.assert_allclose(got["kernel"], want, atol=1e-4)
        np.testing.assert_allclose(got["bias"], taus["bias"][t], atol=1e-5)


def test_density_thins_matrices_alone():
    _, taus = draw(3)
    model = routing.twin(taus, density=0.2)
    kernel, bias = model.others["kernel"], model.others["bias"]
    assert [(np.asarray(x) != 0).sum() for x in kernel] == [4] * T
    assert np.all(np.asarray(bias) != 0)


def test_stacked_matrices_and_dtypes():
    rng = np.random.default_rng(4)
    taus = {"kernel": jnp.asarray(rng.normal(size=(T, 2, D, C)), jnp.bfloat16)}
    model = routing.twin(taus, rank=C, matrices=lambda name, shape: True)
    assert model.low_rank["kernel"]["a"].shape == (T, 2, D, C)
    got = routing.twin_delta(model, jnp.eye(T)[2])["kernel"]
    assert got.dtype == jnp.bfloat16
    want = np.asarray(taus["kernel"][2], np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.1)


def apply_fn(params, x):
    return x @ params["kernel"] + params["bias"][None]


def test_the_router_chooses_by_features_of_the_shared_model():
    base, taus = draw(5)
    base = jax.tree.map(lambda x: 0.1 * x, base)
    model = routing.twin(taus, scale=0.3, rank=2)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, D)), jnp.float32)
    router = routing.init_router(jax.random.key(0), C, T, depth=1, std=1.0)
    got = routing.twin_apply(apply_fn, apply_fn)(router, model, base, x)
    shared = tree.add_scaled(base, model.shared)
    weights = jax.nn.softmax(routing.router(router, apply_fn(shared, x)))
    assert np.ptp(weights, axis=0).max() > 0.1
    for b in range(len(x)):
        own = tree.add_scaled(base, routing.twin_delta(model, weights[b]))
        want = apply_fn(own, x[b : b + 1])[0]
        np.testing.assert_allclose(got[b], want, atol=1e-4)
    # A router that is sure of a task leaves that expert alone.
    sure = {"bias": 100 * jnp.eye(T)[1]}
    full = routing.twin(taus)
    got = routing.twin_apply(apply_fn, apply_fn)(sure, full, base, x)
    want = apply_fn(tree.add_scaled(base, one(taus, 1)), x)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_gradients_reach_the_router_alone():
    base, taus = draw(7)
    model = routing.twin(taus, rank=1)
    router = routing.init_router(jax.random.key(0), C, T, depth=1, std=1.0)
    apply = routing.twin_apply(apply_fn, apply_fn)

    def loss(router, model, base):
        return (apply(router, model, base, jnp.ones((2, D))) ** 2).sum()

    own, *others = jax.grad(loss, (0, 1, 2))(router, model, base)
    assert all(g.any() for g in jax.tree.leaves(own))
    assert not any(g.any() for g in jax.tree.leaves(others))


def test_refuses_by_name():
    _, taus = draw(8)
    with pytest.raises(ValueError, match="twin: both rank and density"):
        routing.twin(taus, rank=1, density=0.5)
    with pytest.raises(ValueError, match="twin: lora_from_taus: rank is 0"):
        routing.twin(taus, rank=0)
    with pytest.raises(ValueError, match="twin: 'bias' is in a task but not in shared"):
        routing.twin(taus, shared={"kernel": jnp.zeros((D, C))})
    with pytest.raises(ValueError, match="twin: 'bias' holds NaN"):
        routing.twin({**taus, "bias": jnp.full((T, C), jnp.nan)})
    with pytest.raises(ValueError, match=r"twin_delta: weights are \(2,\)"):
        routing.twin_delta(routing.twin(taus), jnp.ones(2))
