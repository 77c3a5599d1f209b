import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import bilevel

RNG = np.random.default_rng(1)
ROOTS = RNG.normal(size=(3, 4, 4))
MATRICES = ROOTS @ ROOTS.transpose(0, 2, 1) / 4
TRAIN, VALID = RNG.normal(size=(2, 3, 4))
X = RNG.normal(size=4)


def loss_fn(x, centres):
    off = x[None] - centres
    matrices = jnp.asarray(MATRICES, jnp.float32)
    return jnp.einsum("ti,tij,tj->t", off, matrices, off) / 2


def f32(x):
    return jnp.asarray(x, jnp.float32)


def slopes(centres, x):
    return np.einsum("tij,tj->ti", MATRICES, x - centres)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(logits, rate, steps):
    """Forward sensitivities dx/d(weights) through the steps, then the softmax."""
    w = softmax(logits)
    x, sensitivity = X.copy(), np.zeros((4, 3))
    curvature = np.einsum("t,tij->ij", w, MATRICES)
    for _ in range(steps):
        g = slopes(TRAIN, x)
        sensitivity = sensitivity - rate * (g.T + curvature @ sensitivity)
        x = x - rate * w @ g
    return slopes(VALID, x) @ sensitivity @ (np.diag(w) - np.outer(w, w))


@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradients_in_closed_form(steps):
    logits = np.array([0.3, -0.5, 0.1])
    got = jax.jit(
        lambda logits: bilevel.moml_hypergradients(
            loss_fn,
            f32(X),
            logits,
            f32(TRAIN),
            f32(VALID),
            learning_rate=0.2,
            steps=steps,
        )
    )(f32(logits))
    np.testing.assert_allclose(got, oracle(logits, 0.2, steps), rtol=1e-3, atol=1e-5)


def test_update_takes_the_shortest_combination():
    """By a fine grid over the simplex of three tasks."""
    method = bilevel.moml(loss_fn, inner_rate=0.2, tx=optax.sgd(1.0))
    grads, state, info = jax.jit(method.update)(
        f32(X), method.init(3), f32(TRAIN), f32(VALID)
    )
    rows = oracle(np.zeros(3), 0.2, 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    side = np.linspace(0, 1, 201)
    a, b = (v.ravel() for v in np.meshgrid(side, side))
    grid = np.stack([a, b, 1 - a - b])[:, a + b <= 1]
    best = np.linalg.norm(rows.T @ grid, axis=0).min()
    np.testing.assert_allclose(np.linalg.norm(info.hypergradient), best, atol=5e-3)
    np.testing.assert_allclose(
        method.weights(state), softmax(-np.asarray(info.hypergradient)), rtol=1e-5
    )
    np.testing.assert_allclose(
        grads, method.weights(state) @ slopes(TRAIN, X), rtol=1e-4, atol=1e-5
    )
    # No validation loss rises to first order.
    assert (rows @ info.hypergradient >= -1e-4).all()


def test_zero_hypergradients_move_nothing():
    method = bilevel.moml(lambda x, c: jnp.stack([x - x, x - x]))
    _, state, info = method.update(jnp.array(1.0), method.init(2), 0.0, 0.0)
    np.testing.assert_array_equal(info.hypergradient, 0)
    np.testing.assert_allclose(method.weights(state), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"inner_rate": -1.0}, "inner_rate is -1.0"), ({"inner_steps": 0}, "inner_steps")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        bilevel.moml(loss_fn, **options)
