import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import train
from mtl_jax.train.state import merge


def linear(x_dtype=jnp.float32, **changes):
    def loss(params, batch, key):
        del key
        error = (batch["x"] * params["w"][None]).sum(-1) - batch["y"]
        return jnp.mean(error**2), {"first": params["w"][0]}

    options = {
        "init": lambda key: {"w": jnp.asarray([1.0, -2.0], x_dtype)},
        "loss_fn": loss,
        "tx": optax.sgd(0.1),
    }
    return train.Trainable(**(options | changes))


def data(size=8):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(size, 2)).astype(np.float32),
        "y": rng.normal(size=size).astype(np.float32),
    }


def oracle(steps, decay):
    """Gradient descent on the mean square error and its average, float64."""
    x, y = (np.asarray(v, np.float64) for v in data().values())
    w = np.array([1.0, -2.0])
    ema, losses, norms = w.copy(), [], []
    for _ in range(steps):
        error = x @ w - y
        grad = 2 * x.T @ error / len(y)
        losses.append(np.mean(error**2))
        norms.append(np.linalg.norm(grad))
        w = w - 0.1 * grad
        ema = decay * ema + (1 - decay) * w
    return w, ema, losses, norms


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_steps_match_gradient_descent(one_device, accumulate):
    trainer = train.Trainer(linear(), mesh=one_device, accumulate=accumulate, ema=0.7)
    result = trainer.fit(lambda step: data(), steps=5, log_every=1)
    w, ema, losses, norms = oracle(5, 0.7)
    np.testing.assert_allclose(result.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(result.state.ema["w"], ema, rtol=1e-5)
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)
    found = [r["grad_norm"] for r in result.history]
    np.testing.assert_allclose(found, norms, rtol=1e-5)
    assert int(result.state.step) == 5


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch(toy, accumulate):
    trainable = toy.trainable(loss_fn=toy.noiseless)
    mesh = train.make_mesh(4, devices=jax.devices()[:4])
    whole = train.Trainer(trainable, mesh=mesh).fit(toy.batches, steps=6)
    parts = train.Trainer(trainable, mesh=mesh, accumulate=accumulate)
    split = parts.fit(toy.batches, steps=6)
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_microbatches_draw_their_own_noise(one_device):
    def loss(params, batch, key):
        del batch
        return params["w"].sum() * 0 + jax.random.normal(key), {}

    losses = []
    for accumulate in (1, 4):
        trainer = train.Trainer(
            linear(loss_fn=loss), mesh=one_device, accumulate=accumulate
        )
        fit = trainer.fit(lambda step: data(), steps=2, log_every=1)
        losses.append([r["loss"] for r in fit.history])
    assert len(set(losses[0] + losses[1])) == 4


def test_scalars_in_the_batch_reach_every_microbatch(one_device):
    def loss(params, batch, key):
        del key
        return jnp.mean(batch["x"]) * 0 + params["w"].sum() * batch["t"], {}

    trainer = train.Trainer(linear(loss_fn=loss), mesh=one_device, accumulate=2)
    fit = trainer.fit(lambda step: data() | {"t": np.float32(3)}, steps=1, log_every=1)
    assert fit.history[0]["loss"] == -3.0


def test_frozen_leaves_keep_their_bits_and_have_no_state(toy, one_device, equal):
    traced = []

    def loss(params, batch, key):
        traced.append(type(params["scale"]).__name__)
        return toy.loss(params, batch, key)

    frozen = ("scale", "body")
    trainable = toy.trainable(loss_fn=loss, frozen=frozen, tx=optax.adamw(0.1))
    trainer = train.Trainer(trainable, mesh=one_device)
    params = toy.init(jax.random.key(3))
    result = trainer.fit(toy.batches, steps=4, params=params)
    equal(result.params["body"], params["body"])
    equal(result.params["scale"], params["scale"])
    assert np.abs(result.params["head"]["kernel"] - params["head"]["kernel"]).min() > 0
    shapes = sorted(x.shape for x in jax.tree.leaves(result.state.opt_state))
    assert shapes == [(), (8, 2), (8, 2)]


def test_no_gradient_is_computed_for_frozen_leaves(toy, one_device):
    batch = train.shard_batch(one_device, toy.batch(0))

    def flops(frozen):
        trainer = train.Trainer(toy.trainable(frozen=frozen), mesh=one_device)
        return train.count_flops(trainer.compiled_step, trainer.abstract_state, batch)

    forward = 2 * 16 * (4 * 8 + 8 * 2)
    assert flops(("scale", "body")).total == forward + 2 * 16 * 8 * 2
    assert flops(("scale",)).total == forward + 2 * 16 * (8 * 2 * 2 + 4 * 8)


def test_failed_step_leaves_the_state_and_later_steps_do_nothing(toy, trainer, equal):
    state = trainer.init_state(0)
    state, _ = trainer.step(state, toy.batch(0))
    before = jax.tree.map(jnp.copy, state)
    bad = toy.batch(1)
    bad["y"][3, 1] = np.inf
    state, metrics = trainer.step(state, bad)
    assert not bool(metrics["finite"])
    state, metrics = trainer.step(state, toy.batch(2))
    assert not bool(metrics["finite"]) and np.isfinite(metrics["loss"])
    assert not bool(state.finite)
    equal(state._replace(finite=before.finite), before)


def test_low_precision_gradients_are_summed_in_float32(one_device):
    def loss(params, batch, key):
        del key
        return jnp.mean(params["w"].astype(jnp.float32).sum() * batch["x"]), {}

    # bfloat16 has 8 bits: 256 + 1 = 256, so a bfloat16 sum would lose every one.
    x = np.ones((8, 1), np.float32)
    x[0] = 256
    trainable = linear(jnp.bfloat16, loss_fn=loss, tx=optax.sgd(1.0))
    trainer = train.Trainer(trainable, mesh=one_device, accumulate=8)
    state, _ = trainer.step(trainer.init_state(), {"x": x})
    assert state.params["w"].dtype == jnp.bfloat16
    grad = jnp.asarray((256 + 7) / 8, jnp.bfloat16)
    expected = jnp.asarray([1.0, -2.0], jnp.bfloat16) - grad
    np.testing.assert_array_equal(state.params["w"], expected)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, b, k: p["w"].sum(), r"\(loss, dict of metrics\), found"),
        (lambda p, b, k: (p["w"], {}), r"'loss' of loss_fn wants to be a scalar"),
        (lambda p, b, k: (p["w"].sum(), {"m": p["w"]}), r"'m' of loss_fn.*\(2,\)"),
        (
            lambda p, b, k: (p["w"].sum(), {"grad_norm": 1.0}),
            r"\['grad_norm'\] of loss_fn are taken",
        ),
    ],
)
def test_bad_loss_functions(one_device, loss_fn, message):
    trainer = train.Trainer(linear(loss_fn=loss_fn), mesh=one_device)
    with pytest.raises(ValueError, match=message):
        trainer.step(trainer.init_state(), data())


def test_optimizer_that_changes_its_state_is_named(one_device):
    tx = optax.GradientTransformation(
        lambda params: {"n": jnp.zeros((), jnp.int32)},
        lambda updates, state, params=None: (updates, {"n": state["n"] + 0.5}),
    )
    trainer = train.Trainer(linear(tx=tx), mesh=one_device)
    with pytest.raises(ValueError, match="changed 'opt_state/n': wanted int32"):
        trainer.step(trainer.init_state(), data())


def test_loss_value_reaches_the_optimizer(one_device):
    def update(updates, state, params=None, *, value, **extra):
        return updates, value

    tx = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros(()), update)
    trainer = train.Trainer(linear(tx=tx), mesh=one_device)
    state, metrics = trainer.step(trainer.init_state(), data())
    assert float(state.opt_state) == float(metrics["loss"]) > 0


def test_merged_parameters_have_the_users_structure(toy, trainer):
    state = trainer.init_state(1)
    whole = merge(state.params, state.frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(toy.init(jax.random.key(0)))


def test_clipping_and_decay_masks_take_frozen_leaves(toy, one_device):
    tx = train.optimizer("adamw", 1e-2, clip_norm=1.0, no_decay=("bias",))
    trainer = train.Trainer(toy.trainable(tx=tx), mesh=one_device)
    assert int(trainer.fit(toy.batches, steps=2).state.step) == 2
