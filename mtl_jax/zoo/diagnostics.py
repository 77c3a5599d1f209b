"""What merging studies show of learning and of predictions, each in one place."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import losses, metrics, report, tree
from mtl_jax.zoo.learning import Trace
from mtl_jax.zoo.material import Material


def add_table(
    study: Any,
    title: str,
    columns: Sequence[str],
    rows: Any,
    form: str = ".1%",
    caption: str = "",
) -> None:
    """A table whose columns beside the first have one format."""
    study.report.add_table(
        report.Table(
            title=title,
            columns=tuple(columns),
            rows=tuple(rows),
            formats=dict.fromkeys(columns[1:], form),
            caption=caption,
        )
    )


def add_course(
    study: Any, traces: Mapping[str, Trace], models: Mapping[str, Callable[[Any], Any]]
) -> dict[str, list[float]]:
    """Mean loss between the recorded steps, and test accuracy at them.

    Args:
      study: gets figures and tables.
      traces: by row, all recorded at the same steps.
      models: by row, for rows whose accuracy is wanted: variables to trained leaves.

    Returns:
      Mean losses by row.
    """
    means, curves, steps = {}, {}, [0]
    for name, trace in traces.items():
        steps = [0, *(step for step, _ in trace.path)]
        means[name] = [
            float(trace.losses[a:b].mean()) for a, b in itertools.pairwise(steps)
        ]
        if name in models:
            found = [models[name](variables) for _, variables in trace.path]
            curves[name] = [float(study.measure(m, "test").mean()) for m in found]
    for title, series, form in (
        ("Mean test accuracy after steps", curves, ".1%"),
        ("Mean loss of the batches up to a step", means, ".3f"),
    ):
        if series:
            study.report.add_figure(
                title, report.Lines(x=steps[1:], series=series, x_label="step")
            )
            rows = [(name, *values) for name, values in series.items()]
            add_table(study, title, ("row", *map(str, steps[1:])), rows, form)
    return means


def add_entropy(study: Any, trained: Any) -> float:
    """Mean over tasks of the rank correlation of entropy and cross-entropy."""
    material, rows = Material(study.evaluator), []
    for task, name in enumerate(study.names):
        parts = [
            material.outputs(trained, task, batch)
            for batch in study.evaluator.rows(task, "test")
        ]
        found = jnp.concatenate(parts)
        labels = jnp.asarray(study.zoo.tasks[task].splits["test"]["label"])
        cost = losses.softmax_cross_entropy(found, labels)
        rows.append((name, metrics.spearman(losses.softmax_entropy(found), cost)))
    mean = float(np.mean([value for _, value in rows]))
    title = "Rank correlation of entropy and cross-entropy over test rows"
    add_table(study, title, ("task", "Spearman"), (*rows, ("mean", mean)), ".3f")
    return mean


def add_shares(study: Any, models: Mapping[str, Any]) -> None:
    """The largest share of one class among predictions: has a model collapsed?"""

    def largest(classes):
        return float(np.bincount(classes).max() / len(classes))

    rows = []
    for task, data in enumerate(study.zoo.tasks):
        found = [
            largest(study.evaluator.predict(trained, task, "test"))
            for trained in models.values()
        ]
        rows.append((data.name, largest(data.splits["test"]["label"]), *found))
    title = "Share of the class that is predicted most often"
    add_table(study, title, ("task", "labels", *models), rows)


def add_coefficients(study: Any, title: str, coeffs: Any) -> None:
    """Coefficients by leaf and task."""
    table = np.stack([np.asarray(x) for x in jax.tree.leaves(coeffs)])
    study.report.add_figure(
        title,
        report.Heatmap(
            rows=tree.paths(coeffs), columns=study.names, values=table.tolist()
        ),
    )
