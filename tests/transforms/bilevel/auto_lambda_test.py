"""Quadratics `L_t(x) = (x - c_t)^T A_t (x - c_t) / 2`, whose slopes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import bilevel


def problem(seed=0, tasks=3, size=4):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(tasks, size, size))
    matrices = roots @ roots.transpose(0, 2, 1) / size
    return matrices, rng.normal(size=(2, tasks, size)), rng.normal(size=size)


def losses_of(matrices):
    matrices = jnp.asarray(matrices, jnp.float32)

    def loss_fn(params, centres):
        x = jnp.concatenate([params["a"], params["b"].reshape(-1)])
        off = x[None] - centres
        return jnp.einsum("ti,tij,tj->t", off, matrices, off) / 2

    return loss_fn


def params_of(x):
    x = jnp.asarray(x, jnp.float32)
    return {"a": x[:2], "b": x[2:].reshape(1, -1)}


def slopes(matrices, centres, x):
    return np.einsum("tij,tj->ti", matrices, x - centres)


@pytest.mark.parametrize("derivative", ["exact", "difference", "auto"])
@pytest.mark.parametrize("primary", [None, [1.0, 0.0, 0.0]])
def test_hypergradient_in_closed_form(derivative, primary):
    matrices, (train, valid), x = problem()
    weights, rate = np.array([0.5, 0.2, 0.9]), 0.3
    g = slopes(matrices, train, x)
    ahead = x - rate * weights @ g
    counts = np.ones(3) if primary is None else np.array(primary)
    want = -rate * g @ (counts @ slopes(matrices, valid, ahead))
    got = jax.jit(
        lambda params: bilevel.auto_lambda_hypergradient(
            losses_of(matrices),
            params,
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(train, jnp.float32),
            jnp.asarray(valid, jnp.float32),
            learning_rate=rate,
            primary=None if primary is None else jnp.asarray(primary),
            derivative=derivative,
        )
    )(params_of(x))
    # Central differences are exact on quadratics but for rounding.
    tolerance = 5e-3 if derivative == "difference" else 1e-4
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_update_is_one_step_above_and_a_weighted_gradient_below():
    matrices, (train, valid), x = problem()
    method = bilevel.auto_lambda(
        losses_of(matrices), inner_rate=0.3, tx=optax.sgd(0.1), start_weight=0.5
    )
    grads, state, info = jax.jit(method.update)(
        params_of(x),
        method.init(3),
        jnp.asarray(train, jnp.float32),
        jnp.asarray(valid, jnp.float32),
    )
    g = slopes(matrices, train, x)
    ahead = x - 0.3 * 0.5 * g.sum(0)
    slope = -0.3 * g @ slopes(matrices, valid, ahead).sum(0)
    weights = 0.5 - 0.1 * slope
    np.testing.assert_allclose(info.hypergradient, slope, rtol=1e-4)
    np.testing.assert_allclose(method.weights(state), weights, rtol=1e-4)
    flat = np.concatenate([grads["a"], np.ravel(grads["b"])])
    np.testing.assert_allclose(flat, weights @ g, rtol=1e-4, atol=1e-5)
    assert bool(info.finite) and int(state.step) == 1


def test_harmful_task_loses_weight():
    """Task 1 pulls away from where task 0, the one that matters, wants to be."""

    def loss_fn(x, centre):
        return jnp.stack([jnp.square(x - centre), jnp.square(x + 3 * centre)])

    method = bilevel.auto_lambda(
        loss_fn, inner_rate=0.1, tx=optax.sgd(0.1), primary=[0]
    )
    x, state = jnp.array(0.0), method.init(2)
    update = jax.jit(method.update)
    for _ in range(60):
        grads, state, _ = update(x, state, jnp.array(1.0), jnp.array(1.0))
        x = x - 0.1 * grads
    weights = method.weights(state)
    assert weights[0] > 0.2 and abs(float(weights[1])) < 0.01
    assert float(x) == pytest.approx(1, abs=0.02)


def test_rate_may_be_a_schedule():
    matrices, (train, valid), x = problem()
    batches = jnp.asarray(train, jnp.float32), jnp.asarray(valid, jnp.float32)

    def slope(rate, step):
        method = bilevel.auto_lambda(losses_of(matrices), inner_rate=rate)
        state = method.init(3)._replace(step=jnp.int32(step))
        return method.update(params_of(x), state, *batches)[2].hypergradient

    schedule = optax.linear_schedule(0.0, 0.4, 4)
    np.testing.assert_allclose(slope(schedule, 2), slope(0.2, 0), rtol=1e-5)


def test_falls_back_where_the_backward_pass_has_no_transpose():
    @jax.custom_vjp
    def square(x):
        return x * x

    def backward(x, g):
        return (jnp.clip(g, -1e6, 1e6) * 2 * x,)

    square.defvjp(lambda x: (x * x, x), backward)

    def loss_fn(x, centre):
        return jnp.stack([square(x - centre), square(x + centre)])

    args = loss_fn, jnp.array(0.5), jnp.ones(2), jnp.array(1.0), jnp.array(1.0)
    got = bilevel.auto_lambda_hypergradient(*args, learning_rate=0.1)
    g = np.array([2 * -0.5, 2 * 1.5])
    ahead = 0.5 - 0.1 * g.sum()
    np.testing.assert_allclose(got, -0.1 * g * 4 * ahead, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: bilevel.auto_lambda(f, inner_rate=0.0), "inner_rate is 0.0"),
        (
            lambda f: bilevel.auto_lambda(f, inner_rate=1.0, primary=[3]).update(
                jnp.zeros(2), bilevel.auto_lambda(f, inner_rate=1.0).init(2), 0.0, 0.0
            ),
            "no primary task 3 among 2",
        ),
        (lambda f: bilevel.auto_lambda(f, inner_rate=1.0).init(0), "num_tasks is 0"),
        (
            lambda f: bilevel.auto_lambda_hypergradient(
                f,
                jnp.zeros(2),
                jnp.ones(2),
                0.0,
                0.0,
                learning_rate=1.0,
                derivative="x",
            ),
            "derivative is 'x', wanted one of auto, difference, exact",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(lambda x, _: x)
