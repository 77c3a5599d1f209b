import dataclasses
import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from mtl_jax import multitask, report
from mtl_jax.data.multitask import Target
from mtl_jax.multitask import Outcome
from mtl_jax.run import compare

TARGETS = (
    Target("sign", "binary", 1, True, "auc"),
    Target("third", "classification", 3, True, "accuracy"),
    Target("sum", "regression", 1, False, "rmse"),
)


@pytest.fixture
def toy():
    names = tuple(target.name for target in TARGETS)
    return types.SimpleNamespace(targets=TARGETS, task_names=names)


class FakeBench:
    """Answers without training; errors fall as the weights of `sum` rise."""

    def __init__(self, problem, measures=()):
        self.problem, self.measures = problem, dict.fromkeys(measures)
        self.settings = multitask.Settings(steps=4, batch_size=2, optimizer={})
        self.asked, self.released = [], 0

    def release(self):
        self.released += 1

    def run(self, method, seed):
        self.asked.append((method.name, seed))
        weights = method.about.get("weights", [1, 1, 1])
        if method.tasks:
            values = {method.tasks[0]: 0.5}
        else:
            values = {"sign": 0.5, "third": 0.6, "sum": 0.5 / weights[2]}
        return Outcome(
            validation=values,
            test=values,
            history={"conflict_rate": (0.0, 0.25 + 0.5 * (seed == 1))},
            measured=dict.fromkeys(self.measures, float(seed)),
            step_seconds=0.1,
        )


def comparison(problem, quiet, seeds=(0, 1), measures=()):
    config = ConfigDict({"seeds": seeds, "study": {"tuning_steps": 4}})
    bench = FakeBench(problem, measures)
    return compare.Comparison(bench, config, report.Report("x"), quiet)


def test_change_against_single_tasks_in_percent(toy, quiet):
    found = comparison(toy, quiet)
    found.run(multitask.Contest(rows=()))
    assert list(found.results) == ["single tasks", "equal weights", "tuned weights"]
    # 0 of sign, +20% of third, 0 of sum; single tasks are their own reference.
    np.testing.assert_allclose(found.results["equal weights"].delta, 20 / 3)
    np.testing.assert_allclose(found.results["single tasks"].delta, 0)


def test_validation_chooses_among_candidates_for_each_seed(toy, quiet):
    found = comparison(toy, quiet)
    found.run(multitask.Contest(rows=()))
    tuned = found.results["tuned weights"]
    assert tuned.chosen == ("0.75 0.75 1.5",) * 2
    # A third less error in the task whose metric falls.
    np.testing.assert_allclose(tuned.delta, (20 + 100 / 3) / 3, rtol=1e-6)
    assert found.wins("tuned weights", "equal weights") == (
        2,
        pytest.approx(100 / 9),
    )


def test_what_was_measured_and_the_second_half_of_the_training(toy, quiet):
    found = comparison(toy, quiet, measures=("sharpness",))
    found.run(multitask.Contest(rows=()))
    row = found.results["equal weights"]
    np.testing.assert_allclose(row.last("conflict_rate"), [0.25, 0.75])
    np.testing.assert_allclose(row.last("sharpness"), [0, 1])
    assert np.isnan(row.last("weather")).all()


def test_report_has_table_claims_and_figures(toy, quiet, tmp_path, capsys):
    found = comparison(toy, quiet, measures=("sharpness",))
    found.run(
        multitask.Contest(
            rows=(), analyses=(lambda c: c.claim("sun is hot", "yes", True),)
        )
    )
    compare.write(found, tmp_path)
    sections = json.loads((tmp_path / "report/results.json").read_text())["sections"]
    first = sections[0]["table"]
    assert first["title"] == "Test metrics" and "sharpness" in first["columns"]
    assert len(first["rows"]) == 3
    assert sections[1]["table"]["rows"] == [["sun is hot", "yes", True]]
    titles = [s["title"] for s in sections if s["kind"] == "figure"]
    assert titles[0] == "Change against single tasks"
    assert "Share of conflicting task pairs over the training" in titles
    assert "6.67 ± 0.00" in capsys.readouterr().out


def test_many_tasks_share_columns(toy, quiet, monkeypatch):
    monkeypatch.setattr(compare, "_COLUMNS", 2)
    found = comparison(toy, quiet)
    found.run(multitask.Contest(rows=()))
    compare._add_table(found)
    (table,) = found.report.tables
    kinds = dict.fromkeys(t.metric for t in toy.targets)
    means = tuple(f"mean {kind}" for kind in kinds)
    assert table.columns[2 : 3 + len(means)] == (*means, "worst task, change")
    # `third` is an accuracy and went from 0.5 to 0.6; nothing became worse.
    worst = table.columns.index("worst task, change")
    assert table.rows[1][worst] == "0.0 ± 0.0"
    values = {"sign": 0.5, "third": 0.6, "sum": 0.5}
    for at, kind in enumerate(kinds, 2):
        mean = np.mean([values[t.name] for t in toy.targets if t.metric == kind])
        shown = f"{100 * mean:.1f}" if kind != "rmse" else f"{mean:.3f}"
        assert table.rows[1][at].startswith(f"{shown} ±")


def test_curves_of_the_loss_are_those_of_the_tasks(toy, quiet, tmp_path):
    found = comparison(toy, quiet)
    ask = found.bench.run

    def run(method, seed):
        outcome = ask(method, seed)
        history = {"loss": (1.0, 2.0)}
        if len(method.about.get("weights", ())) == 3:
            history = {"loss": (-9.0, -9.0), "task_loss": (3.0, 4.0)}
        if len(set(method.about.get("weights", ()))) > 1:
            history = {"loss": (9.0, 9.0), "penalty": (2.0, 1.0)}
        return dataclasses.replace(outcome, history=history)

    found.bench.run = run
    found.run(multitask.Contest(rows=()))
    compare.write(found, tmp_path)
    sections = json.loads((tmp_path / "report/results.json").read_text())["sections"]
    (figure,) = (s for s in sections if "raining loss over" in s.get("title", ""))
    assert "4.0" in json.dumps(figure) and "-9" not in json.dumps(figure)


def test_seeds_that_make_no_sense(toy, quiet):
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds wants one or more, each once"):
            comparison(toy, quiet, seeds=seeds)
