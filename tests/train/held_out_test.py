"""Bilevel methods under the trainer: halves, resumption, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import bilevel, train

METHODS = {
    "auto_lambda": functools.partial(bilevel.auto_lambda, inner_rate=0.1),
    "moml": bilevel.moml,
    "forum": functools.partial(bilevel.forum, inner_steps=2),
}


def loss_fn(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch["x"].shape)
    out = jnp.dot(batch["x"] + noise, params["w"]) + params["frozen"]
    losses = jnp.mean(jnp.square(out[:, None] - batch["y"]), 0)
    return losses, {"mean_out": jnp.mean(out)}


def init(key):
    return {"w": jax.random.normal(key, (3,)), "frozen": jnp.ones(())}


def batches(step):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(16, 3)).astype(np.float32),
        "y": rng.normal(size=(16, 2)).astype(np.float32),
    }


def trainable(name, **options):
    return train.Trainable(
        init=init,
        loss_fn=loss_fn,
        tx=optax.adam(1e-2),
        frozen=("frozen",),
        aggregator=bilevel.as_aggregator(METHODS[name], 2),
        grads="bilevel",
        task_names=("a", "b"),
        **options,
    )


def mesh():
    return train.make_mesh(data=1, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_method_by_hand(name):
    """Even rows move the model, odd ones the weights; keys are the trainer's."""
    found = train.Trainer(trainable(name), mesh=mesh()).fit(
        batches, steps=3, seed=4, log_every=1
    )
    init_key, key = jax.random.split(jax.random.key(4))
    params, tx = init(init_key), optax.adam(1e-2)

    def losses(p, each):
        return loss_fn({**p, "frozen": jnp.ones(())}, *each)[0]

    method = METHODS[name](losses)
    update = jax.jit(method.update)
    params, state = {"w": params["w"]}, method.init(2)
    opt_state = tx.init(params)
    for step in range(3):
        batch, own = batches(step), jax.random.fold_in(key, step)
        inner, outer = (
            ({k: x[at::2] for k, x in batch.items()}, jax.random.fold_in(own, at))
            for at in (0, 1)
        )
        grads, state, info = update(params, state, inner, outer)
        with jax.numpy_dtype_promotion("standard"):
            moved, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, moved)
        record = found.history[step]
        np.testing.assert_allclose(record["weight_b"], info.weights[1], rtol=1e-5)
        np.testing.assert_allclose(record["loss_a"], info.losses[0], rtol=1e-5)
        assert "mean_out" in record and "conflict_rate" not in record
    np.testing.assert_allclose(found.params["w"], params["w"], rtol=1e-5)
    np.testing.assert_allclose(
        found.state.opt_state.aggregator.method.upper, state.upper, rtol=1e-5
    )


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    trainer = train.Trainer(trainable("forum"))
    whole = trainer.fit(batches, steps=4)
    trainer.fit(batches, steps=2, workdir=tmp_path)
    rest = trainer.fit(batches, steps=4, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole.params, rest.params)
    jax.tree.map(
        np.testing.assert_array_equal, whole.state.opt_state, rest.state.opt_state
    )


def test_a_held_out_half_that_is_not_finite_stops_the_run():
    def bad(step):
        batch = batches(step)
        batch["y"][1::2] = np.nan
        return batch

    with pytest.raises(train.NonFiniteError):
        train.Trainer(trainable("moml"), mesh=mesh()).fit(bad, steps=1)


@pytest.mark.fast
def test_what_does_not_go_together_is_refused():
    made = trainable("moml")
    for change in ({"grads": "map"}, {"aggregator": optax.sgd(1.0)}):
        with pytest.raises(ValueError, match="grads='bilevel' goes with a bilevel"):
            dataclasses.replace(made, **change)
    with pytest.raises(ValueError, match="grads='bilevel' takes no shared"):
        dataclasses.replace(made, shared=("w",))
    with pytest.raises(ValueError, match="holds out a half .* use accumulate=1"):
        train.Trainer(made, accumulate=2)
    with pytest.raises(ValueError, match="bilevel: these methods look at losses"):
        made.aggregator.update({}, None)
    odd = {k: x[:15] for k, x in batches(0).items()}
    with pytest.raises(ValueError, match="half of the batch; found 15 rows, wanted a"):
        train.Trainer(made, mesh=mesh()).fit(lambda step: odd, steps=1)
