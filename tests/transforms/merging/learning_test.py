"""The loop that learns what a merge depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)
BASE = {"w": RNG.normal(size=(4, 3)).astype(np.float32), "step": np.int32(1)}
TAUS = {
    "w": RNG.normal(size=(2, 4, 3)).astype(np.float32),
    "step": np.zeros(2, np.int32),
}
BATCHES = RNG.normal(size=(6, 2, 5, 4)).astype(np.float32)
TARGETS = RNG.normal(size=(2, 3)).astype(np.float32)


def params_fn(coeffs, args):
    return merging.compose(args["base"], args["taus"], coeffs)


def loss_fn(params, batch, task, args):
    del args
    error = batch @ params["w"] - task[None]
    return jnp.mean(error**2) * params["step"].astype(error.dtype)


ARGS = {"base": BASE, "taus": TAUS}


def by_hand(coeffs, steps, rate):
    """Gradient descent in float64, with slopes from inner products."""
    history = []
    for batch in BATCHES[:steps]:
        w = BASE["w"] + np.tensordot(coeffs, TAUS["w"].astype(np.float64), 1)
        slope, losses = 0, []
        for x, y in zip(batch.astype(np.float64), TARGETS, strict=True):
            error = x @ w - y
            losses.append(np.mean(error**2))
            slope = slope + 2 * x.T @ error / error.size
        history.append(losses)
        coeffs = coeffs - rate * np.tensordot(TAUS["w"], slope, 2)
    return coeffs, np.array(history)


def test_descends_as_by_hand():
    run = merging.learner(params_fn, loss_fn, optax.sgd(0.1))
    found = run(jnp.zeros(2), BATCHES, TARGETS, ARGS)
    want, losses = by_hand(np.zeros(2), 6, 0.1)
    np.testing.assert_allclose(found.variables, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)


def test_two_halves_are_the_whole():
    run = merging.learner(params_fn, loss_fn, optax.adam(0.1))
    whole = run(jnp.zeros(2), BATCHES, TARGETS, ARGS)
    first = run(jnp.zeros(2), BATCHES[:3], TARGETS, ARGS)
    second = run(first.variables, BATCHES[3:], TARGETS, ARGS, first.state)
    np.testing.assert_allclose(second.variables, whole.variables, rtol=1e-5)
    assert not np.allclose(first.variables, whole.variables)


def test_another_task_set_compiles_nothing():
    traced = []

    def counted(params, batch, task, args):
        traced.append(1)
        return loss_fn(params, batch, task, args)

    run = merging.learner(params_fn, counted, optax.sgd(0.1))
    first = run(jnp.zeros(2), BATCHES, TARGETS, ARGS)
    count = len(traced)
    second = run(jnp.zeros(2), BATCHES[::-1], TARGETS + 1, ARGS)
    assert len(traced) == count
    assert not np.allclose(first.variables, second.variables)


def test_a_penalty_pulls():
    run = merging.learner(
        params_fn, loss_fn, optax.sgd(0.05), penalty=lambda c: 5.0 * jnp.sum(c**2)
    )
    free = merging.learner(params_fn, loss_fn, optax.sgd(0.05))
    pulled = run(jnp.ones(2), BATCHES, TARGETS, ARGS).variables
    loose = free(jnp.ones(2), BATCHES, TARGETS, ARGS).variables
    assert np.linalg.norm(pulled) < np.linalg.norm(loose)
    one = run(jnp.ones(2), BATCHES[:1], TARGETS, ARGS).variables
    step, _ = by_hand(np.ones(2), 1, 0.05)
    np.testing.assert_allclose(one, step - 0.05 * 10.0, rtol=1e-4, atol=1e-5)


def test_what_no_loss_sees_stays():
    """A leaf that fine-tuning left alone keeps its coefficients, whatever happens."""
    base = {**BASE, "still": np.ones(3, np.float32)}
    taus = {**TAUS, "still": np.zeros((2, 3), np.float32)}

    def seen(params, batch, task, args):
        shifted = {**params, "w": params["w"] + params["still"][None]}
        return loss_fn(shifted, batch, task, args)

    run = merging.learner(params_fn, seen, optax.adam(0.1))
    start = merging.init_coefficients(taus, 0.3)
    found = run(start, BATCHES, TARGETS, {"base": base, "taus": taus}).variables
    np.testing.assert_array_equal(found["still"], start["still"])
    assert not np.allclose(found["w"], start["w"])


def test_narrow_models_learn():
    base = {"w": jnp.asarray(BASE["w"], jnp.bfloat16), "step": jnp.int32(1)}
    run = merging.learner(params_fn, loss_fn, optax.sgd(0.1))

    def narrow(batch):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), batch)

    found = run(
        jnp.zeros(2), narrow(BATCHES), narrow(TARGETS), {"base": base, "taus": TAUS}
    )
    want, _ = by_hand(np.zeros(2), 6, 0.1)
    np.testing.assert_allclose(found.variables, want, rtol=0.1, atol=0.03)
