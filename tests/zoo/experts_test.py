import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import train, tree, zoo
from mtl_jax.zoo import experts

SETTINGS = zoo.Settings(
    steps=4,
    batch_size=16,
    optimizer={"name": "adam", "peak": 5e-4, "decay": False},
    logit_scale=16.0,
    seed=0,
)


def _open(suite, folder, quiet, **options):
    return zoo.open_zoo(*suite, SETTINGS, folder=folder, progress=quiet, **options)


def test_experts_move_and_are_cached(tiny_suite, tmp_path, quiet, monkeypatch):
    first = _open(tiny_suite, tmp_path, quiet)
    assert [record["task"] for record in first.records] == ["task0", "task1", "task2"]
    for expert in first.experts["standard"]:
        moved = jax.tree.map(lambda a, b: jnp.any(a != b), expert, first.base)
        assert all(jax.tree.leaves(moved))
    monkeypatch.setattr(
        experts, "_train_expert", lambda *_: pytest.fail("trained a cached expert")
    )
    second = _open(tiny_suite, tmp_path, quiet)
    for a, b in zip(first.experts["standard"], second.experts["standard"], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_any_setting_makes_another_expert(tiny_suite, tmp_path, quiet):
    encoder, tasks = tiny_suite
    _open((encoder, tasks[:1]), tmp_path, quiet)
    other = dataclasses.replace(SETTINGS, seed=1)
    zoo.open_zoo(encoder, tasks[:1], other, folder=tmp_path, progress=quiet)
    assert len(list(tmp_path.glob("standard-task0-*.safetensors"))) == 2


def test_a_damaged_file_is_named(tiny_suite, tmp_path, quiet):
    encoder, tasks = tiny_suite
    _open((encoder, tasks[:1]), tmp_path, quiet)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=path.name):
        _open((encoder, tasks[:1]), tmp_path, quiet)


def test_checkpoints_are_gone_when_the_expert_is_there(tiny_suite, tmp_path, quiet):
    encoder, tasks = tiny_suite
    plain = _open((encoder, tasks[:1]), tmp_path / "a", quiet)
    saved = _open((encoder, tasks[:1]), tmp_path / "b", quiet, checkpoint_every=2)
    jax.tree.map(
        np.testing.assert_array_equal,
        plain.experts["standard"][0],
        saved.experts["standard"][0],
    )
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".safetensors"]


def test_unknown_mode_is_refused(tiny_suite, tmp_path, quiet):
    with pytest.raises(ValueError, match="found 'tangent'"):
        _open(tiny_suite, tmp_path, quiet, modes=("tangent",))


@pytest.mark.parametrize("mode", experts.MODES)
def test_two_steps_are_those_of_the_mode_s_own_model(tiny_suite, mode):
    """Against gradients of the loss written out here; the modes part at step two."""
    encoder, tasks = tiny_suite
    prototypes = tasks[0].head["prototypes"]
    settings = dataclasses.replace(
        SETTINGS, optimizer={"name": "sgd", "peak": 0.5, "decay": False}
    )
    trainer = train.Trainer(zoo.trainable(encoder, tasks[0].head, settings, mode))
    params = {"encoder": encoder.params, "head": tasks[0].head}
    if mode == "linear":
        params["origin"] = encoder.split(encoder.params)[0]
    batch = {k: jnp.asarray(v[:16]) for k, v in tasks[0].splits["train"].items()}

    def loss(trained, mode):
        features = encoder.features(encoder.params, batch)
        if mode == "standard":
            features = encoder.features(trained, batch)
        else:
            delta = jax.tree.map(lambda a, b: a - b, trained, encoder.params)
            _, moved = jax.jvp(
                lambda p: encoder.features(p, batch), (encoder.params,), (delta,)
            )
            features = features + moved
        unit = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        scores = jax.nn.log_softmax(16.0 * unit @ prototypes.T)
        return -jnp.mean(jnp.take_along_axis(scores, batch["label"][:, None], 1))

    def two_steps(mode):
        trained = encoder.params
        for _ in range(2):
            grads = jax.grad(loss)(trained, mode)
            trained = jax.tree.map(lambda p, g: p - 0.5 * g, trained, grads)
        return trained

    state = trainer.init_state(0, params)
    for _ in range(2):
        state, _ = trainer.step(state, batch)
    got, want = state.params["encoder"], two_steps(mode)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    other = two_steps("standard" if mode == "linear" else "linear")
    apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), want, other)
    assert max(jax.tree.leaves(apart)) > 1e-3


def test_head_and_origin_never_move(tiny_suite):
    encoder, tasks = tiny_suite
    trainable = zoo.trainable(encoder, tasks[0].head, SETTINGS, "linear")
    params = {
        "encoder": encoder.params,
        "head": tasks[0].head,
        "origin": encoder.params,
    }
    batch = {k: v[:16] for k, v in tasks[0].splits["train"].items()}
    result = train.Trainer(trainable).fit(lambda step: batch, steps=3, params=params)
    for part in ("head", "origin"):
        jax.tree.map(np.testing.assert_array_equal, result.params[part], params[part])
    assert tree.size(result.state.opt_state) < 3 * tree.size(encoder.params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 10**20),
        ("logit_scale", float("nan")),
        ("logit_scale", 0.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"Settings: {name} wants"):
        dataclasses.replace(SETTINGS, **{name: value})


def test_a_zoo_of_nothing(tiny_suite, tmp_path, quiet):
    with pytest.raises(ValueError, match="open_zoo: wants tasks and modes"):
        _open(tiny_suite, tmp_path, quiet, modes=())
    for every in (0, "abc"):
        with pytest.raises(ValueError, match="checkpoint_every wants"):
            _open(tiny_suite, tmp_path, quiet, checkpoint_every=every)
