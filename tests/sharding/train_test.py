"""Training on one device and on eight gives the same numbers up to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtl_jax import train
from mtl_jax.train.hlo import collectives

RULES = (("w1$", P("data", "model")), ("w2$", P("model", None)), (".*", P()))


def init(key):
    first, second = jax.random.split(key)
    return {
        "w1": 0.3 * jax.random.normal(first, (8, 16)),
        "b1": jnp.zeros(16),
        "w2": 0.3 * jax.random.normal(second, (16, 8)),
        "fixed": jnp.ones(8),
    }


def loss(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    error = hidden @ params["w2"] * params["fixed"][None] - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def batch(step):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=(32, 8)).astype(np.float32) for k in ("x", "y")}


def trainer(mesh, **options):
    trainable = train.Trainable(
        init=init,
        loss_fn=loss,
        tx=train.optimizer("adamw", 1e-2, clip_norm=1.0),
        rules=RULES,
        frozen=("fixed",),
    )
    return train.Trainer(trainable, mesh=mesh, ema=0.9, **options)


def single(**options):
    return trainer(train.make_mesh(devices=jax.devices()[:1]), **options)


@pytest.mark.parametrize("axes", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(axes, accumulate):
    one = single(accumulate=accumulate).fit(batch, steps=8, log_every=1)
    many = trainer(train.make_mesh(*axes), accumulate=accumulate)
    result = many.fit(batch, steps=8, log_every=1)
    if accumulate == 1:  # Microbatches draw noise in their own shape, but the same.
        assert one.history[0]["loss"] == pytest.approx(
            result.history[0]["loss"], rel=1e-6
        )
    for tree in ("params", "ema", "frozen"):
        for a, b in zip(
            jax.tree.leaves(getattr(one.state, tree)),
            jax.tree.leaves(getattr(result.state, tree)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(
        [record["loss"] for record in one.history],
        [record["loss"] for record in result.history],
        rtol=1e-5,
    )


def test_every_copy_of_a_parameter_is_split_like_it_and_stays_so():
    many = trainer(train.make_mesh(4, 2))
    state = many.init_state()
    for _ in range(2):
        adam = state.opt_state[1][0]
        for copy in (state.params, state.ema, adam.mu, adam.nu):
            assert copy["w1"].sharding.spec == P("data", "model")
            assert copy["w1"].addressable_shards[0].data.shape == (2, 8)
            assert copy["w2"].addressable_shards[0].data.shape == (8, 8)
        assert state.frozen["fixed"].sharding.is_fully_replicated
        state, _ = many.step(state, batch(0))


def test_initial_parameters_do_not_depend_on_the_layout():
    one, many = single().init_state(3), trainer(train.make_mesh(2, 4)).init_state(3)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_resume_is_exact_on_the_same_layout_and_close_on_another(tmp_path):
    many = trainer(train.make_mesh(4, 2))
    straight = many.fit(batch, steps=6)
    many.fit(batch, steps=3, workdir=tmp_path / "a", checkpoint_every=2)
    same = many.fit(batch, steps=6, workdir=tmp_path / "a")
    single().fit(batch, steps=3, workdir=tmp_path / "b")
    other = many.fit(batch, steps=6, workdir=tmp_path / "b")
    for a, b, c in zip(
        jax.tree.leaves(straight.params),
        jax.tree.leaves(same.params),
        jax.tree.leaves(other.params),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        np.testing.assert_allclose(a, c, atol=2e-6)
        assert a.sharding == c.sharding


def test_no_parameter_is_gathered_whole_over_the_model_axis():
    many = trainer(train.make_mesh(1, 8))
    state, data = many.init_state(), train.shard_batch(many.mesh, batch(0))
    text = many.compiled_step.lower(state, data).compile().as_text()
    gathered = {c.shape for c in collectives(text) if c.kind == "all-gather"}
    assert gathered <= {(16,)}  # The replicated bias only.
    assert any(c.kind == "all-reduce" for c in collectives(text))
