import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation, train, tree

T = 4
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(T, 8)).astype(np.float32)


def init():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "trunk": jax.random.normal(keys[0], (5, 6)),
        "heads": jax.random.normal(keys[1], (T, 6)),
        "shift": jnp.full(6, 0.1),  # Used by both.
    }


def encode(params, x, y):
    return jnp.tanh(x @ params["trunk"] + params["shift"][None])


def heads(params, copies, x, y):
    found = jnp.einsum("tbd,td->tb", copies + params["shift"], params["heads"])
    return jnp.mean((found - y) ** 2, 1)


def at(params, z, t):
    """Loss of one task at fixed features, by itself."""
    return jnp.mean(((z + params["shift"][None]) @ params["heads"][t] - Y[t]) ** 2)


LOSS = aggregation.SplitLoss(encode=encode, heads=heads, num_tasks=T)


@pytest.fixture(autouse=True)
def any_rank():
    with jax.numpy_rank_promotion("allow"):
        yield


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
    )


def test_feature_gradients_are_those_of_each_task_alone():
    losses, grads, _ = aggregation.value_and_feature_grads(LOSS)(init(), X, Y)
    z = encode(init(), X, Y)
    close(losses, jnp.stack([at(init(), z, t) for t in range(T)]))
    close(grads, jnp.stack([jax.grad(at, 1)(init(), z, t) for t in range(T)]))


def test_the_sum_at_the_features_is_the_gradient_of_the_sum():
    _, grads, pullback = aggregation.value_and_feature_grads(LOSS)(init(), X, Y)
    wanted = jax.grad(lambda p: LOSS(p, X, Y).sum())(init())
    close(pullback(grads.sum(0)), wanted)


def test_weights_act_on_the_encoder_and_not_on_the_heads():
    weights = jnp.array([1.0, 0.0, 3.0, -1.0])
    _, grads, pullback = aggregation.value_and_feature_grads(LOSS)(init(), X, Y)
    found = pullback(tree.combine(grads, weights))

    def encoder_part(params):
        z = encode(params, X, Y)
        fixed = jax.lax.stop_gradient(params)
        return sum(weights[t] * at(fixed, z, t) for t in range(T))

    def head_part(params):
        z = jax.lax.stop_gradient(encode(params, X, Y))
        return sum(at(params, z, t) for t in range(T))

    first, second = jax.grad(encoder_part)(init()), jax.grad(head_part)(init())
    close(found, jax.tree.map(jnp.add, first, second))
    assert not np.any(first["heads"]) and not np.any(second["trunk"])


def test_any_aggregator_works_on_the_features():
    _, grads, pullback = aggregation.value_and_feature_grads(LOSS)(init(), X, Y)
    method = aggregation.pcgrad(seed=1)
    direction, _ = method.update(grads, method.init(grads[0]))
    assert direction.shape == grads.shape[1:]
    assert jax.tree.map(jnp.shape, pullback(direction)) == jax.tree.map(
        jnp.shape, init()
    )


def test_the_encoder_runs_backward_once():
    batch, width = 64, 256
    params = {"trunk": jnp.ones((width, width)), "heads": jnp.ones((T, width))}
    split = aggregation.SplitLoss(
        encode=lambda p, x: jnp.tanh(x @ p["trunk"]),
        heads=lambda p, z, x: jnp.einsum("tbd,td->t", z, p["heads"]),
        num_tasks=T,
    )

    def step(params, x):
        _, grads, pullback = aggregation.value_and_feature_grads(split)(params, x)
        return pullback(grads.sum(0))

    trunk = 2 * batch * width * width
    found = train.count_flops(step, params, jnp.ones((batch, width))).total
    # Forward and the gradient of the kernel; the inputs want none.
    assert 2 * trunk <= found < 2.2 * trunk


def test_aux_and_trees_of_features():
    split = aggregation.SplitLoss(
        encode=lambda p, x: {"a": x @ p, "b": x.sum(1)},
        heads=lambda p, z, x: (z["a"].sum((1, 2)) + z["b"].sum(1), {"n": x.sum()}),
        num_tasks=2,
    )
    fn = aggregation.value_and_feature_grads(split, has_aux=True)
    (losses, aux), grads, pullback = fn(jnp.ones((5, 3)), X)
    assert losses.shape == (2,) and set(aux) == {"n"}
    assert jax.tree.map(jnp.shape, grads) == {"a": (2, 8, 3), "b": (2, 8)}
    assert pullback(jax.tree.map(lambda g: g[0], grads)).shape == (5, 3)


def test_errors():
    with pytest.raises(ValueError, match="num_tasks is 0, wanted >= 1"):
        aggregation.SplitLoss(encode=encode, heads=heads, num_tasks=0)
    wrong = aggregation.SplitLoss(
        encode=encode, heads=lambda *a: heads(*a)[:2], num_tasks=T
    )
    with pytest.raises(ValueError, match="gave 2 losses, num_tasks is 4"):
        aggregation.value_and_feature_grads(wrong)(init(), X, Y)


def test_heads_count_as_they_are_told():
    fn = aggregation.value_and_feature_grads(LOSS, with_features=True)
    _, (z, grads), pullback = fn(init(), X, Y)
    close(z, encode(init(), X, Y))
    counts = jnp.arange(1.0, T + 1)
    found = pullback(jnp.einsum("t,tbd->bd", counts, grads), counts)
    close(found, jax.grad(lambda p: counts @ LOSS(p, X, Y))(init()))
