"""What studies show of learning, from numbers that are known."""

import types

import numpy as np
import pytest

from mtl_jax import report, zoo
from mtl_jax.zoo import diagnostics


@pytest.fixture(scope="module")
def study(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    names = tuple(task.name for task in tiny_zoo.tasks)
    measure = {"worse": np.array([0.2, 0.3]), "better": np.array([0.6, 0.7])}
    return types.SimpleNamespace(
        zoo=tiny_zoo,
        evaluator=evaluator,
        names=names,
        report=report.Report("a study"),
        measure=lambda model, split: measure[model],
    )


def test_losses_are_averaged_between_stops(study):
    losses = np.array([[1.0, 3.0], [3.0, 5.0], [0.0, 0.0]])
    path = ((2, "worse"), (3, "better"))
    trace = zoo.Trace(variables="better", losses=losses, path=path)
    found = diagnostics.add_course(study, {"row": trace}, {"row": lambda x: x})
    assert found == {"row": [3.0, 0.0]}
    tables = {table.title: table for table in study.report.tables}
    accuracy = tables["Mean test accuracy after steps"]
    assert accuracy.columns == ("row", "2", "3")
    np.testing.assert_allclose(accuracy.rows[0][1:], [0.25, 0.65])


def test_correlations_end_with_their_mean(study):
    """The table ends with the mean over tasks; all values are correlations."""
    mean = diagnostics.add_entropy(study, study.zoo.experts["standard"][0])
    (table,) = [t for t in study.report.tables if t.title.startswith("Rank")]
    values = [row[1] for row in table.rows]
    assert [row[0] for row in table.rows] == [*study.names, "mean"]
    assert mean == values[-1] == pytest.approx(np.mean(values[:-1]))
    assert all(-1 <= value <= 1 for value in values)


def test_shares_are_of_the_most_frequent_class(study):
    diagnostics.add_shares(study, {"base": study.zoo.base})
    (table,) = [t for t in study.report.tables if t.title.startswith("Share")]
    for task, (name, labels, base) in enumerate(table.rows):
        assert name == study.names[task]
        rows = study.zoo.tasks[task].splits["test"]["label"]
        assert labels == max(np.mean(rows == c) for c in range(10))
        classes = study.evaluator.predict(study.zoo.base, task, "test")
        assert base == max(np.mean(classes == c) for c in range(10))
