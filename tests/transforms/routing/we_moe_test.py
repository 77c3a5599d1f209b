"""WEMoE on any apply_fn: routes, gradients, and learning without labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import losses, merging, routing, tree

pytestmark = pytest.mark.fast
T, D, C = 3, 6, 4


def features(params, x):
    return jnp.tanh(x @ params["body"]["kernel"])


def apply_fn(params, x):
    return features(params, x) @ params["head"]["kernel"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    base = {"body": {"kernel": part(D, D)}, "head": {"kernel": part(D, C)}}
    taus = jax.tree.map(lambda x: part(T, *x.shape), base)
    return base, taus, part(5, D)


def steering(rows):
    """A router with constant gates."""
    return {"bias": jnp.asarray(rows, jnp.float32)}


def expert(base, taus, t):
    return tree.add_scaled(base, jax.tree.map(lambda x: x[t], taus))


@pytest.mark.parametrize("per", ["example", "batch"])
def test_one_hot_gates_are_experts_and_equal_ones_the_average(case, per):
    base, taus, x = case
    apply = routing.we_moe(apply_fn, features, per=per)
    model = routing.upscale(base, taus, {"all": "kernel"})
    for t in range(T):
        got = apply({"all": steering(np.eye(T)[t])}, model, x)
        np.testing.assert_allclose(got, apply_fn(expert(base, taus, t), x), atol=1e-4)
    got = apply({"all": steering(np.full(T, 1 / T))}, model, x)
    mean = tree.add_scaled(base, merging.average(taus))
    np.testing.assert_allclose(got, apply_fn(mean, x), atol=1e-4)


def test_one_task(case):
    base, taus, x = case
    one = jax.tree.map(lambda t: t[:1], taus)
    model = routing.upscale(base, one, {"all": "kernel"})
    got = routing.we_moe(apply_fn, features)({"all": steering([1.0])}, model, x)
    np.testing.assert_allclose(got, apply_fn(expert(base, taus, 0), x), atol=1e-4)


def test_examples_have_weights_of_their_own(case):
    base, taus, x = case
    groups = {"body": "body", "head": "head"}
    model = routing.upscale(base, taus, groups)
    routers = routing.init_routers(jax.random.key(1), groups, D, T, std=0.5)
    got = routing.we_moe(apply_fn, features)(routers, model, x)
    seen = features(model.params, x)
    for b in range(len(x)):
        gates = {k: routing.router(p, seen[b]) for k, p in routers.items()}
        want = apply_fn(routing.gated(model, gates), x[b : b + 1])[0]
        np.testing.assert_allclose(got[b], want, atol=1e-4)
    together = routing.we_moe(apply_fn, features, per="batch")(routers, model, x)
    gates = {k: routing.router(p, seen).mean(0) for k, p in routers.items()}
    want = apply_fn(routing.gated(model, gates), x)
    np.testing.assert_allclose(together, want, atol=1e-4)
    assert np.abs(got - together).max() > 0.01


def test_gradients_reach_routers_alone(case):
    base, taus, x = case
    model = routing.upscale(base, taus, {"body": "body"})
    routers = routing.init_routers(jax.random.key(2), ["body"], D, T, std=0.5)
    apply = routing.we_moe(apply_fn, features)

    def loss(routers, model):
        return (apply(routers, model, x) ** 2).sum()

    own, others = jax.grad(loss, (0, 1))(routers, model)
    assert all(g.any() for g in jax.tree.leaves(own))
    assert not any(g.any() for g in jax.tree.leaves(others))


def test_routers_learn_from_entropy_alone():
    """Entropy falls, without labels, and gates come to depend on the place."""
    rng = np.random.default_rng(3)
    base = {"kernel": jnp.asarray(0.05 * rng.normal(size=(2, 2)), jnp.float32)}
    sign = jnp.array([[1.0, -1.0], [0.0, 0.0]])
    taus = {"kernel": jnp.stack([sign, -sign])}
    apply = routing.we_moe(
        lambda params, x: x @ params["kernel"], lambda params, x: jax.nn.relu(x)
    )
    model = routing.upscale(base, taus, {"all": "kernel"}, static_scale=0.0)
    routers = {"all": routing.init_router(jax.random.key(4), 2, 2, depth=1, bias=0.3)}
    place = np.array([3.0, -3.0])  # Second coordinate: which task.
    noise = rng.normal(size=(40, 2, 16, 2))
    batches = np.stack([2 * noise[..., 0], place[:, None] + 0.1 * noise[..., 1]], -1)
    batches = jnp.asarray(batches, jnp.float32)

    def loss_fn(routers, batch, task, args):
        del task
        return losses.softmax_entropy(apply(routers, args, batch)).mean()

    run = merging.learner(lambda routers, _: routers, loss_fn, optax.sgd(0.5))
    found = run(routers, batches, args=model)
    before, after = found.losses[0].sum(), found.losses[-1].sum()
    assert after < 0.6 * before
    # Each place got gates of its own.
    gates = routing.router(found.variables["all"], jnp.array([[0.0, 3.0], [0.0, 0.0]]))
    assert np.abs(gates[0] - gates[1]).max() > 0.1


def test_refuses_by_name(case):
    base, taus, x = case
    with pytest.raises(ValueError, match="we_moe: per is 'token'"):
        routing.we_moe(apply_fn, features, per="token")
    model = routing.upscale(base, taus, {"body": "body"})
    apply = routing.we_moe(apply_fn, features)
    with pytest.raises(ValueError, match=r"gated: gates are of \['head'\]"):
        apply({"head": steering(np.ones(T))}, model, x)
    with pytest.raises(ValueError, match=r"\(2,\), wanted \(3,\)"):
        apply({"body": steering([1.0, 2.0])}, model, x)
