import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

B, T = 6, 2
X = np.random.default_rng(0).normal(size=(B, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
BATCH = {"x": X, "y": Y}


def init(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": jax.random.normal(keys[0], (5, 4), dtype),
        "heads": jax.random.normal(keys[1], (4, T), dtype),
    }


def losses_of(params, example):
    """[T] of one example, or [B, T] of many."""
    hidden = jnp.tanh(example["x"] @ params["w"])
    return (hidden @ params["heads"] - example["y"]) ** 2


def mean_of(params, example):
    return losses_of(params, example).mean()


def jacobian(loss_fn, params):
    """[B T, P] float64, forward mode on the whole batch."""
    many = jax.jacfwd(lambda p: jax.vmap(loss_fn, (None, 0))(p, BATCH).reshape(-1))
    leaves = jax.tree.leaves(many(params))
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], 1
    )


def flat(grad):
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(grad)]
    )


@pytest.mark.parametrize("loss_fn", [losses_of, mean_of])
@pytest.mark.parametrize("chunk", [None, 1, 2, B])
def test_gramian_and_way_back(loss_fn, chunk):
    fn = jax.jit(
        lambda p, w: (lambda out: (out[0], out[1], out[2](w)))(
            aggregation.value_and_instance_gramian(loss_fn, chunk=chunk)(p, BATCH)
        )
    )
    rows = jacobian(loss_fn, init())
    weights = jnp.linspace(-1, 2, len(rows))
    losses, gram, grad = fn(init(), weights)
    wanted = jax.vmap(loss_fn, (None, 0))(init(), BATCH)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(
        flat(grad), np.asarray(weights) @ rows, rtol=1e-4, atol=1e-5
    )


def test_it_is_the_gramian_of_a_vector_of_losses():
    whole = lambda p, batch: losses_of(p, batch).reshape(-1)  # noqa: E731
    _, wanted, _ = aggregation.value_and_gramian(whole)(init(), BATCH)
    _, found, _ = aggregation.value_and_instance_gramian(losses_of)(init(), BATCH)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_no_example_is_hurt():
    fn = aggregation.value_and_instance_gramian(losses_of)
    _, gram, pullback = fn(init(), BATCH)
    grad = pullback(aggregation.weights.upgrad(gram))
    rows = jacobian(losses_of, init())
    gains, of_mean = rows @ flat(grad), rows @ rows.mean(0)
    # The ridge of the method leaves a thousandth; the mean does hurt.
    assert gains.min() > -2e-3 * gains.max()
    assert of_mean.min() < -2e-2 * of_mean.max()


def test_aux_args_and_one_example():
    def loss_fn(params, example, scale):
        losses = losses_of(params, example)
        return scale * losses, {"norm": jnp.linalg.norm(example["x"])}

    fn = aggregation.value_and_instance_gramian(loss_fn, has_aux=True)
    (losses, aux), gram, _ = fn(init(), BATCH, 2.0)
    np.testing.assert_allclose(aux["norm"], np.linalg.norm(X, axis=1), rtol=1e-6)
    np.testing.assert_allclose(losses, 2 * losses_of(init(), BATCH), rtol=1e-6)
    one = jax.tree.map(lambda x: x[:1], BATCH)
    (_, _), first, _ = fn(init(), one, 2.0)
    np.testing.assert_allclose(first, gram[:T, :T], rtol=1e-5)


def test_narrow_params_and_a_bad_example():
    fn = aggregation.value_and_instance_gramian(losses_of)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), BATCH)
    losses, gram, pullback = fn(init(jnp.bfloat16), narrow)
    assert losses.dtype == gram.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(pullback(jnp.ones(B * T)))} == {
        jnp.dtype(jnp.bfloat16)
    }
    bad = BATCH | {"x": X.copy()}
    bad["x"][2] = np.nan
    _, gram, _ = fn(init(), bad)
    hurt = np.isnan(np.asarray(gram))
    rows = np.arange(B * T) // T == 2
    np.testing.assert_array_equal(hurt, rows[:, None] | rows[None])


def test_errors():
    fn = aggregation.value_and_instance_gramian
    with pytest.raises(ValueError, match="chunk is 4, wanted a divisor of the 6"):
        fn(losses_of, chunk=4)(init(), BATCH)
    with pytest.raises(ValueError, match="chunk is 0"):
        fn(losses_of, chunk=0)(init(), BATCH)
    with pytest.raises(ValueError, match="one leading axis of 1 or more"):
        fn(losses_of)(init(), BATCH | {"y": Y[:3]})
    with pytest.raises(ValueError, match="one leading axis of 1 or more"):
        fn(losses_of)(init(), jax.tree.map(lambda x: x[:0], BATCH))
    with pytest.raises(ValueError, match="one leading axis of 1 or more"):
        fn(losses_of)(init(), {})
    with pytest.raises(ValueError, match="one leading axis of 1 or more"):
        fn(losses_of)(init(), BATCH | {"scale": 1.0})
    with pytest.raises(ValueError, match=r"one example are \(1, 2\), wanted"):
        fn(lambda p, x: losses_of(p, x)[None])(init(), BATCH)
    with pytest.raises(ValueError, match="one example are tuple"):
        fn(lambda p, x: (losses_of(p, x), 1))(init(), BATCH)
    with pytest.raises(ValueError, match="floating point"):
        fn(lambda p, x: jnp.ones(2, int))(init(), BATCH)
    with pytest.raises(ValueError, match="floating point leaves"):
        fn(losses_of)({"w": jnp.ones(2, int)}, BATCH)
