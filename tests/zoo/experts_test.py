import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses, train, tree, zoo
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
def test_one_step_follows_the_gradient_of_its_own_model(tiny_suite, mode):
    """The first step of either mode is that of plain fine-tuning; the second is not."""
    encoder, tasks = tiny_suite
    trainable = zoo.trainable(encoder, tasks[0].head, SETTINGS, mode)
    trainer = train.Trainer(trainable)
    params = {"encoder": encoder.params, "head": tasks[0].head}
    if mode == "linear":
        params["origin"] = encoder.split(encoder.params)[0]
    batch = {k: v[:16] for k, v in tasks[0].splits["train"].items()}
    state = trainer.init_state(0, params)

    def plain(trained):
        features = encoder.features(trained, batch)
        logits = 16.0 * features @ tasks[0].head["prototypes"].T
        return jnp.mean(losses.softmax_cross_entropy(logits, batch["label"]))

    want = np.sqrt(
        sum(np.sum(g**2) for g in jax.tree.leaves(jax.grad(plain)(encoder.params)))
    )
    state, metrics = trainer.step(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-4)
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
    moved = plain(state.params["encoder"])
    linear_model = abs(float(metrics["loss"]) - float(plain(encoder.params)))
    assert np.isfinite(moved) and linear_model > 0


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
