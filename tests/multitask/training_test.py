import dataclasses
import gc
import weakref

import numpy as np
import pytest

from mtl_jax import aggregation, bilevel, multitask
from mtl_jax.multitask import provenance

SETTINGS = multitask.Settings(
    steps=12, batch_size=16, optimizer={"name": "adam", "peak": 1e-2}
)
EQUAL = multitask.scalarised((1.0, 1.0, 1.0), name="equal")


def bench(problem, tmp_path, quiet, **options):
    return multitask.Bench(
        problem, SETTINGS, progress=quiet, folder=tmp_path, **options
    )


def test_training_learns_and_is_remembered(problem, tmp_path, quiet):
    first = bench(problem, tmp_path, quiet).run(EQUAL, 0)
    assert not first.remembered and set(first.test) == set(problem.task_names)
    assert first.history["loss"][-1] < first.history["loss"][0]
    again = bench(problem, tmp_path, quiet).run(EQUAL, 0)
    assert again == dataclasses.replace(first, remembered=True)
    fresh = bench(problem, tmp_path, quiet, remember=False).run(EQUAL, 0)
    assert not fresh.remembered and fresh.test == first.test


def test_released_methods_leave_nothing_compiled(problem, tmp_path, quiet):
    found = bench(problem, tmp_path, quiet, remember=False)
    found.run(multitask.scalarised((1.0,) * 3), 0)
    ((_, _, trainer),) = found._trainers.values()
    gone = weakref.ref(trainer)
    del trainer
    found.release()
    gc.collect()
    assert gone() is None


def test_every_part_of_the_question_counts(problem, tmp_path, quiet):
    one = bench(problem, tmp_path, quiet)
    longer = multitask.Bench(
        problem,
        dataclasses.replace(SETTINGS, steps=13),
        progress=quiet,
        folder=tmp_path,
    )
    one.run(EQUAL, 0)
    assert not one.run(EQUAL, 1).remembered
    assert not one.run(multitask.scalarised((1.0, 1.0, 2.0)), 0).remembered
    assert not longer.run(EQUAL, 0).remembered
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_is_made_again(problem, tmp_path, quiet):
    one = bench(problem, tmp_path, quiet)
    found = one.run(EQUAL, 0)
    (file,) = tmp_path.iterdir()
    for text in ("", "{", "[]", '{"test": {}}'):
        file.write_text(text)
        again = one.run(EQUAL, 0)
        assert not again.remembered and again.test == found.test


def test_one_task_alone_has_a_model_of_its_own(problem, tmp_path, quiet):
    found = bench(problem, tmp_path, quiet).run(multitask.single("sum"), 0)
    assert set(found.test) == {"sum"}


@pytest.mark.fast
def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="steps wants at least 1, found 0"):
        dataclasses.replace(SETTINGS, steps=0)


def test_every_batch_has_rows_of_every_task(own_rows_problem, tmp_path, quiet):
    one = bench(own_rows_problem, tmp_path, quiet)
    draw = one._batches(own_rows_problem, seed=3)
    labels = {0: set(), 1: set()}
    for step in range(12):
        batch = draw(step)
        assert batch["x"].shape == (16, 6)
        np.testing.assert_array_equal(np.sort(batch["task"]), [0] * 8 + [1] * 8)
        for task in labels:
            labels[task] |= set(batch["label"][batch["task"] == task].tolist())
    assert labels == {0: {0, 1}, 1: {0, 1, 2}}
    alone = multitask.take(own_rows_problem, ["b"])
    assert one._batches(alone, seed=3)(0)["x"].shape == (8, 6)
    found = one.run(multitask.aggregated("MGDA", aggregation.mgda), 0)
    assert min(found.history["grad_norm"]) > 0


def test_batches_too_small_for_all_tasks(own_rows_problem, tmp_path, quiet):
    small = dataclasses.replace(SETTINGS, batch_size=1)
    one = multitask.Bench(own_rows_problem, small, progress=quiet, folder=tmp_path)
    with pytest.raises(ValueError, match="a row for each of 2 tasks, found 1"):
        one.run(multitask.scalarised((1.0, 1.0)), 0)


def test_bilevel_methods_are_trained_and_remembered(problem, tmp_path, quiet):
    def run():
        method = multitask.bilevel("MOML", bilevel.moml, inner_rate=0.2)
        return bench(problem, tmp_path, quiet).run(method, 0)

    first = run()
    assert not first.remembered and first.history["loss"][-1] < first.history["loss"][0]
    weights = [first.history[f"weight_{name}"][-1] for name in problem.task_names]
    assert sum(weights) == pytest.approx(1) and len(set(weights)) == 3
    assert run() == dataclasses.replace(first, remembered=True)


@pytest.mark.fast
def test_a_bilevel_method_says_how_many_rows_it_sees():
    two, one = (multitask.bilevel("MOML", bilevel.moml, draws=n) for n in (2, 1))
    assert (two.draws, one.draws) == (2, 1) and two.about != one.about
    assert two.about["bilevel"] == "moml"


def test_each_step_of_a_bilevel_method_gets_its_rows(own_rows_problem, tmp_path, quiet):
    one = bench(own_rows_problem, tmp_path, quiet)
    batch = one._batches(own_rows_problem, 3, draws=2)(0)
    for half in (batch["task"][::2], batch["task"][1::2]):
        np.testing.assert_array_equal(np.sort(half), [0] * 8 + [1] * 8)
    method = multitask.bilevel("FORUM", bilevel.forum, inner_steps=1)
    assert np.isfinite(one.run(method, 0).history["loss"]).all()


def test_outcomes_of_other_code_are_read_where_that_is_asked_for(
    problem, tmp_path, quiet, monkeypatch
):
    first = bench(problem, tmp_path, quiet).run(EQUAL, 0)
    monkeypatch.setattr(provenance, "package_digest", lambda: "changed")
    lenient = bench(problem, tmp_path, quiet, reuse="any code")
    assert lenient.run(EQUAL, 0) == dataclasses.replace(first, remembered=True)
    assert len(list(tmp_path.iterdir())) == 1
    assert not bench(problem, tmp_path, quiet).run(EQUAL, 0).remembered
    assert len(list(tmp_path.iterdir())) == 2
    assert not lenient.run(EQUAL, 1).remembered
    edited = dataclasses.replace(EQUAL, code="of another file")
    assert not bench(problem, tmp_path, quiet).run(edited, 0).remembered


def test_measures_count_by_their_source(problem, tmp_path, quiet, monkeypatch):
    def run():
        measures = {"one": lambda problem, params: 1.0}
        return bench(problem, tmp_path, quiet, measures=measures).run(EQUAL, 0)

    assert not run().remembered and run().remembered
    monkeypatch.setattr(provenance, "function_digest", lambda function: "edited")
    assert not run().remembered


@pytest.mark.fast
def test_reuse_of_what_does_not_exist(problem, quiet):
    with pytest.raises(ValueError, match="reuse is 'all', wanted one of"):
        bench(problem, None, quiet, reuse="all")


def test_methods_that_compare_two_batches_are_trained(
    own_rows_problem, tmp_path, quiet
):
    method = multitask.aggregated("MoDo", aggregation.modo, draws=2)
    found = bench(own_rows_problem, tmp_path, quiet).run(method, 0)
    assert np.isfinite(found.history["loss"]).all()
    weights = [found.history[f"weight_{name}"][-1] for name in ("a", "b")]
    assert sum(weights) == pytest.approx(1, abs=1e-5) and weights[0] != weights[1]
