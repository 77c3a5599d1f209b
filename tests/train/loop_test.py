import json
import logging
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import train
from mtl_jax.train import loop


class Counter:
    """An iterator whose position is one number."""

    def __init__(self, batch):
        self.batch, self.index = batch, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        return self.batch(self.index - 1)

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


def sources(toy):
    return {
        "function": lambda: toy.batch,
        "iterator": lambda: Counter(toy.batch),
        "list": lambda: toy.batches,
    }


def test_one_compilation_serves_every_fit(toy, one_device, caplog, tmp_path):
    traces = []

    def loss(params, batch, key):
        traces.append(1)
        return toy.loss(params, batch, key)

    trainer = train.Trainer(toy.trainable(loss_fn=loss), mesh=one_device)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        first = trainer.fit(toy.batches, steps=3)
        trainer.fit(toy.batches, steps=3, params=first.params, seed=4)
        for steps in (2, 4):
            trainer.fit(toy.batch, steps=steps, workdir=tmp_path)
        numpy_params = jax.tree.map(np.asarray, first.params)
        trainer.fit(toy.batches, steps=2, params=numpy_params)
    assert len(traces) == 1
    compiled = [m for m in caplog.messages if m.startswith("Compiling jit(step)")]
    assert len(compiled) == 1


def test_given_parameters_are_not_consumed(toy, trainer, equal):
    params = toy.init(jax.random.key(5))
    kept = jax.tree.map(np.array, params)
    first = trainer.fit(toy.batches, steps=3, params=params)
    second = trainer.fit(toy.batches, steps=3, params=params)
    equal(params, jax.tree.map(jnp.asarray, kept))
    equal(first.params, second.params)
    assert np.abs(first.params["body"]["kernel"] - kept["body"]["kernel"]).max() > 0


def test_seeds_decide_initial_parameters_and_noise(toy, trainer):
    runs = [trainer.fit(toy.batches, steps=2, seed=s, log_every=1) for s in (0, 0, 1)]
    losses = [run.history[-1]["loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_loss_falls_on_a_learnable_problem(toy, one_device):
    trainable = toy.trainable(tx=optax.adam(3e-2))
    trainer = train.Trainer(trainable, mesh=one_device)
    batch = toy.batch(0)
    history = trainer.fit(lambda step: batch, steps=150, log_every=149).history
    assert [record["step"] for record in history] == [149, 150]
    first = trainer.fit(lambda step: batch, steps=1).history[0]["loss"]
    assert history[-1]["loss"] < 0.5 * first


@pytest.mark.parametrize("kind", ["function", "iterator", "list"])
def test_resumed_run_equals_the_uninterrupted_one(
    toy, one_device, tmp_path, equal, kind
):
    source = sources(toy)[kind]
    trainer = train.Trainer(toy.trainable(), mesh=one_device, ema=0.9)
    straight = trainer.fit(source(), steps=9, log_every=2)
    trainer.fit(source(), steps=4, log_every=2, workdir=tmp_path)
    resumed = trainer.fit(source(), steps=9, log_every=2, workdir=tmp_path)
    equal(resumed.state, straight.state)
    assert resumed.history == straight.history
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 9]


def test_grain_iterators_resume(toy, one_device, tmp_path, equal):
    grain = pytest.importorskip("grain")
    trainer = train.Trainer(toy.trainable(), mesh=one_device)
    rows = [{k: v[0] for k, v in toy.batch(i, 1).items()} for i in range(40)]
    data = grain.MapDataset.source(rows).seed(3).shuffle().repeat().batch(8)
    data = data.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    straight = trainer.fit(data, steps=7)
    trainer.fit(data, steps=3, workdir=tmp_path)
    equal(trainer.fit(data, steps=7, workdir=tmp_path).params, straight.params)


def test_finished_run_is_read_back_without_data(toy, trainer, tmp_path, equal):
    done = trainer.fit(toy.batches, steps=3, workdir=tmp_path)
    again = trainer.fit([], steps=3, workdir=tmp_path)
    equal(done.state, again.state)
    assert again.history == done.history


def test_records_past_the_last_checkpoint_are_made_again(toy, trainer, tmp_path):
    trainer.fit(toy.batches, steps=4, log_every=1, workdir=tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    history = trainer.fit(toy.batches, steps=6, log_every=1, workdir=tmp_path).history
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[4]["loss"] != 0.0


def test_checkpoints_are_kept_as_asked(toy, trainer, tmp_path):
    trainer.fit(toy.batches, steps=7, workdir=tmp_path, checkpoint_every=2, keep=3)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4", "6", "7"}


def test_progress_sees_every_step_and_evaluation_is_recorded(toy, trainer):
    calls, seen = [], []

    def eval_fn(params):
        seen.append(np.asarray(params["scale"]))
        return {"accuracy": len(seen) / 10}

    history = trainer.fit(
        toy.batches,
        steps=5,
        log_every=4,
        progress=lambda step, steps, metrics: calls.append((step, steps, metrics)),
        eval_fn=eval_fn,
        eval_every=2,
    ).history
    assert [(step, steps) for step, steps, _ in calls] == [(i, 5) for i in range(1, 6)]
    assert {"loss", "grad_norm", "mae"} <= set(calls[0][2])
    assert calls[2][2]["eval/accuracy"] == 0.1
    evals = [(r["step"], r["eval/accuracy"]) for r in history if "eval/accuracy" in r]
    assert evals == [(2, 0.1), (4, 0.2), (5, 0.3)]
    assert seen[0].shape == (4,)


def test_evaluation_sees_the_average(toy, one_device):
    trainer = train.Trainer(toy.trainable(), mesh=one_device, ema=0.5)
    seen = []
    result = trainer.fit(
        toy.batches, steps=3, eval_fn=lambda p: seen.append(p["head"]["kernel"]) or {}
    )
    np.testing.assert_array_equal(seen[0], result.state.ema["head"]["kernel"])
    assert np.abs(seen[0] - result.params["head"]["kernel"]).max() > 0


def test_a_step_that_is_not_finite_stops_the_run_and_says_where(toy, trainer, tmp_path):
    batches = [toy.batch(i) for i in range(6)]
    batches[2]["y"][0, 0] = np.nan
    with pytest.raises(train.NonFiniteError) as caught:
        trainer.fit(batches, steps=6, workdir=tmp_path)
    message = str(caught.value)
    assert message.startswith("fit: step 2 is not finite: ")
    assert "metric 'loss' is nan" in message
    assert "not finite in batch: 'y'" in message
    assert "not finite in gradient: 'body/bias', 'body/kernel'" in message
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 2 and report["params"] == []
    with np.load(tmp_path / "nonfinite_batch.npz") as dumped:
        np.testing.assert_array_equal(dumped["x"], batches[2]["x"])


def test_nan_in_given_parameters_is_named(toy, trainer):
    params = toy.init(jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(train.NonFiniteError, match="params: 'head/kernel'"):
        trainer.fit(toy.batches, steps=3, params=params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps wants at least 1, found 0"),
        ({"steps": 3, "log_every": 0}, "log_every wants at least 1"),
        ({"steps": 3, "checkpoint_every": 2}, "checkpoint_every wants a workdir"),
        ({"steps": 21}, "the data ended after 20 batches"),
    ],
)
def test_bad_arguments(toy, trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer.fit(toy.batches, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"extra": p["scale"]}, "'extra' is in params but not in init"),
        (lambda p: p | {"scale": jnp.ones(5)}, r"'scale' is \(5,\) in params, \(4,\)"),
        (
            lambda p: p | {"scale": jnp.ones(4, jnp.bfloat16)},
            "'scale' is bfloat16 in params, float32 in init",
        ),
    ],
)
def test_parameters_must_look_like_those_of_init(toy, trainer, change, message):
    params = change(toy.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=message):
        trainer.fit(toy.batches, steps=1, params=params)


def test_another_command_in_the_same_folder_is_refused(
    toy, trainer, one_device, tmp_path
):
    trainer.fit(toy.batches, steps=3, workdir=tmp_path)
    with pytest.raises(ValueError, match="another run: seed is 0 there, 1 here$"):
        trainer.fit(toy.batches, steps=3, workdir=tmp_path, seed=1)
    with pytest.raises(ValueError, match="a run of 3 steps, found steps=2"):
        trainer.fit(toy.batches, steps=2, workdir=tmp_path)
    other = train.Trainer(toy.trainable(), mesh=one_device, ema=0.9)
    with pytest.raises(
        ValueError, match="another run: ema is not set there, 0.9 here$"
    ):
        other.fit(toy.batches, steps=5, workdir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"tx": optax.adam(1e-2)}, {}, r'optimizer.\d is "EmptyState" there, not set'),
        ({"tx": optax.sgd(1e-2)}, {}, 'optimizer.0 is "ScaleByAdamState" there'),
        ({"frozen": ()}, {}, "leaf 'scale' is frozen there, trained here"),
        ({}, {"accumulate": 2}, "accumulate is 1 there, 2 here"),
    ],
)
def test_another_way_to_train_in_the_same_folder_is_refused(
    toy, trainer, one_device, tmp_path, changes, options, message
):
    trainer.fit(toy.batches, steps=1, workdir=tmp_path)
    other = train.Trainer(toy.trainable(**changes), mesh=one_device, **options)
    with pytest.raises(ValueError, match=f"holds another run: .*{message}"):
        other.fit(toy.batches, steps=2, workdir=tmp_path)


def test_other_batches_in_the_same_folder_are_refused(toy, trainer, tmp_path):
    trainer.fit(toy.batches, steps=2, workdir=tmp_path)
    small = [toy.batch(step, 8) for step in range(4)]
    with pytest.raises(
        ValueError, match=r'batch.x is "float32\[16, 4\]" there, "float'
    ):
        trainer.fit(small, steps=4, workdir=tmp_path)
    more = [batch | {"z": batch["x"]} for batch in toy.batches]
    with pytest.raises(ValueError, match="batch.z is not set there"):
        trainer.fit(more, steps=4, workdir=tmp_path)


def test_batches_that_change_shape_resume(toy, trainer, tmp_path, equal):
    batches = [toy.batch(step, (16, 8, 4)[step % 3]) for step in range(6)]
    straight = trainer.fit(batches, steps=6)
    for steps in (2, 4, 6):
        found = trainer.fit(batches, steps=steps, workdir=tmp_path)
    equal(found.state, straight.state)


def test_the_callers_identity_tells_runs_apart(toy, trainer, tmp_path):
    identity = {"optimizer": {"peak": 0.1, "betas": (0.9, 0.99)}, "tasks": ["a", "b"]}
    trainer.fit(toy.batches, steps=1, workdir=tmp_path, identity=identity)
    trainer.fit(toy.batches, steps=2, workdir=tmp_path, identity=identity)
    other = identity | {"optimizer": {"peak": 0.2, "betas": (0.9, 0.99)}}
    with pytest.raises(ValueError, match="run: identity.optimizer.peak is 0.1 there, "):
        trainer.fit(toy.batches, steps=3, workdir=tmp_path, identity=other)
    with pytest.raises(ValueError, match="identity.tasks.1.* there, not set here"):
        trainer.fit(toy.batches, steps=3, workdir=tmp_path)
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="identity wants plain data"):
            trainer.fit(toy.batches, steps=3, workdir=tmp_path, identity=bad)


def test_unwritable_folder(toy, trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        trainer.fit(toy.batches, steps=1, workdir=tmp_path / "file" / "run")


@pytest.mark.parametrize(("at", "saved"), [(1, 3), (2, 4), (6, 6)])
def test_a_signal_saves_and_ends_the_process_even_at_the_last_step(
    toy, trainer, tmp_path, equal, capsys, at, saved
):
    def progress(step, steps, metrics):
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(train.Interrupted) as caught:
        trainer.fit(toy.batches, steps=6, workdir=tmp_path, progress=progress)
    assert (caught.value.code, caught.value.step) == (143, saved)
    assert capsys.readouterr().err == f"{caught.value}\n"
    resumed = trainer.fit(toy.batches, steps=6, workdir=tmp_path)
    equal(resumed.state, trainer.fit(toy.batches, steps=6).state)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_late_signal_of_another_process_ends_this_one_too(
    toy, trainer, tmp_path, monkeypatch, steps
):
    """Agreement after the last boundary, also with no step left to run."""
    trainer.fit(toy.batches, steps=1, workdir=tmp_path)
    asked = []

    def agreed(run, received, done):
        asked.append(done)
        assert received is None
        return signal.SIGTERM if len(asked) == steps else 0

    monkeypatch.setattr(loop._Run, "agreed", agreed)
    with pytest.raises(train.Interrupted) as caught:
        trainer.fit(toy.batches, steps=steps, workdir=tmp_path)
    assert (asked, caught.value.step) == ([steps] * steps, steps)


def test_without_a_folder_signals_are_left_alone(toy, trainer):
    def progress(step, steps, metrics):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(toy.batches, steps=6, progress=progress)


def test_fit_runs_in_a_thread(toy, trainer, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(trainer.fit(toy.batches, steps=1, workdir=tmp_path))
    )
    thread.start()
    thread.join()
    assert int(found[0].state.step) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate wants >= 1, found 0"),
        ({"ema": 1.0}, r"ema wants a decay in \(0, 1\), found 1.0"),
    ],
)
def test_bad_trainer_options(toy, options, message):
    with pytest.raises(ValueError, match=message):
        train.Trainer(toy.trainable(), **options)
