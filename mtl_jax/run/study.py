"""A merging study: every row tuned and measured the same way, then the report."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import io, report, tree
from mtl_jax.run.experiment import Experiment
from mtl_jax.transforms import merging
from mtl_jax.zoo import (
    Evaluator,
    Fit,
    LearnedModel,
    Material,
    PostHoc,
    Row,
    SharedModel,
    TaskModels,
    Zoo,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one row.

    Attributes:
      row: the row.
      chosen: the scale of the model, or one knob per task.
      grid: what was tried.
      curve: mean normalised accuracy on validation data over the grid; for task
        models its best possible counterpart per knob.
      accuracy: [T] on test data.
      normalised: [T], accuracy divided by the expert's of the same kind.
      bits: storage of what serves all tasks.
      seconds: making, tuning and measuring; None where all answers were remembered.
      details: what a merge that learns kept for analyses; empty for the others.
    """

    row: Row
    chosen: tuple[float, ...]
    grid: tuple[float, ...]
    curve: tuple[float, ...]
    accuracy: np.ndarray
    normalised: np.ndarray
    bits: int
    seconds: float | None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Study(Experiment):
    """A zoo, its task vectors, and the results so far; what analyses work on.

    Attributes, beside those of every `Experiment`:
      zoo: experts and tasks.
      evaluator: accuracy by content.
      taus: expert kind -> task vectors with leaves [T, ...].
    """

    results: dict[str, Result]

    def __init__(
        self,
        zoo: Zoo,
        evaluator: Evaluator,
        config: ConfigDict,
        document: report.Report,
        progress: report.Progress,
    ):
        super().__init__(config, document, progress)
        self.zoo = zoo
        self.evaluator = evaluator
        self.taus = {
            kind: merging.task_vectors(zoo.base, family)
            for kind, family in zoo.experts.items()
        }
        self._reference: dict[tuple[str, str, bool], np.ndarray] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Task names."""
        return tuple(task.name for task in self.zoo.tasks)

    @property
    def chosen(self) -> dict[str, tuple[float, ...]]:
        """What validation chose, by row."""
        return {name: result.chosen for name, result in self.results.items()}

    def reference(self, kind: str, split: str, *, linear: bool) -> np.ndarray:
        """[T] accuracy of the experts of a kind on their own tasks, in a space."""
        key = (kind, split, linear)
        if key not in self._reference:
            found = [
                self.evaluator.accuracy(expert, task, split, linear=linear)
                for task, expert in enumerate(self.zoo.experts[kind])
            ]
            if min(found) <= 0:
                name = self.names[int(np.argmin(found))]
                raise ValueError(
                    f"reference: the expert of {name!r} is never right on its {split} "
                    "rows; nothing can be measured by it"
                )
            self._reference[key] = np.array(found)
        return self._reference[key]

    def move(self, delta: chex.ArrayTree, scale: float = 1.0) -> Any:
        """Trained leaves `base + scale * delta`."""
        return tree.add_scaled(self.zoo.base, delta, scale)

    def measure(self, trained: Any, split: str, *, linear: bool = False) -> np.ndarray:
        """[T] accuracy of one model on every task."""
        return np.array(self.evaluator.accuracies(trained, split, linear=linear))

    def score(
        self,
        delta: chex.ArrayTree,
        scale: float,
        split: str,
        tasks: Sequence[int] | None = None,
        *,
        kind: str = "standard",
        linear: bool = False,
    ) -> float:
        """Mean normalised accuracy of `base + scale * delta` on some or all tasks."""
        tasks = range(len(self.zoo.tasks)) if tasks is None else tasks
        model = self.move(delta, scale)
        digest = io.digest(model)
        found = [
            self.evaluator.accuracy(model, t, split, linear=linear, digest=digest)
            for t in tasks
        ]
        reference = self.reference(kind, split, linear=linear)[list(tasks)]
        return merging.normalised_accuracy(found, reference)

    def run(self, system: PostHoc) -> None:
        """Tunes and measures every row in order, then runs the analyses."""
        for row in system.rows:
            if row.experts not in self.taus:
                raise ValueError(
                    f"study: row {row.name!r} wants {row.experts!r} experts; modes has "
                    f"{', '.join(self.taus)}"
                )
        with self.progress.task("methods", total=len(system.rows)) as bar:
            for row in system.rows:
                with self.progress.task(row.name):
                    found = self._measured(row)
                self.results[row.name] = found
                bar.advance(
                    method=row.name, normalised=float(np.mean(found.normalised))
                )
        for analysis in system.analyses:
            analysis(self)

    def _measured(self, row: Row) -> Result:
        """One row, tuned and measured."""
        began = (time.monotonic(), self.evaluator.computed)
        taus = self.taus[row.experts]
        if isinstance(row, TaskModels):
            state = row.prepare(taus, self.chosen)
            return self._per_task(row, state, began)
        if isinstance(row, SharedModel):
            return self._shared(row, row.delta(taus, self.chosen), began)
        material = Material(self.evaluator, labels=row.labels, linear=row.linear)
        fit = row.fit(taus, self.chosen, material)
        self.evaluator.computed += 1  # Learning is never remembered.
        found = self._learned(row, fit, began)
        return dataclasses.replace(found, details=fit.details)

    def _learned(self, row: LearnedModel, fit: Fit, began) -> Result:
        """A merge that learned, as what it turned out to be."""
        if fit.delta is not None:
            return self._shared(row, fit.delta, began)
        if len(row.scales) > 1:
            raise ValueError(
                f"study: row {row.name!r} has a grid of scales, and not one delta"
            )
        found = []
        if fit.features is not None:
            found = self.evaluator.accuracies_of(fit.features, fit.params, "test")
        elif fit.task_delta is not None:
            for task in range(len(self.zoo.tasks)):
                model = self.move(fit.task_delta(task), row.scales[0])
                found.append(
                    self.evaluator.accuracy(model, task, "test", linear=row.linear)
                )
        chosen = (row.scales[0],)
        result = self._result(row, chosen, row.scales, (), np.array(found), began)
        if fit.features is None:
            return result
        bits = 8 * tree.nbytes(fit.params) + 32 * tree.size(self.zoo.frozen)
        return dataclasses.replace(result, bits=bits)

    def _shared(
        self, row: SharedModel | LearnedModel, delta: chex.ArrayTree, began
    ) -> Result:
        if row.linear and len(row.scales) > 1:
            score = self._tangent_scores(delta, row).__getitem__
        else:

            def score(scale: float) -> float:
                return self.score(
                    delta, scale, "validation", kind=row.experts, linear=row.linear
                )

        scale, grid, curve = row.scales[0], row.scales, ()
        if len(row.scales) > 1:
            search = merging.scale_search(score, row.scales)
            scale = search.scale
            trials = sorted((trial.scale, trial.value) for trial in search.trials)
            grid, curve = zip(*trials, strict=True)
        accuracy = self.measure(self.move(delta, scale), "test", linear=row.linear)
        return self._result(row, (scale,), grid, curve, accuracy, began)

    def _tangent_scores(
        self, delta: chex.ArrayTree, row: SharedModel | LearnedModel
    ) -> dict[float, float]:
        """Validation score at every scale and at 0, all from one pass over the rows."""
        scales = sorted({0.0, *row.scales})
        found = np.array(
            [
                self.evaluator.tangent_accuracies(delta, scales, task, "validation")
                for task in range(len(self.zoo.tasks))
            ]
        )
        reference = self.reference(row.experts, "validation", linear=row.linear)
        return {
            scale: merging.normalised_accuracy(accuracy, reference)
            for scale, accuracy in zip(scales, found.T, strict=True)
        }

    def _per_task(self, row: TaskModels, state: Any, began) -> Result:
        curves, chosen, accuracy = [], [], []
        reference = self.reference(row.experts, "validation", linear=row.linear)
        for task in range(len(self.zoo.tasks)):

            def accurate(knob: float, split: str = "validation", task: int = task):
                model = self.move(row.delta(state, task, knob))
                return self.evaluator.accuracy(model, task, split, linear=row.linear)

            knob = row.knobs[0]
            if len(row.knobs) > 1:
                found = [accurate(knob) for knob in row.knobs]
                knob = row.knobs[int(np.argmax(found))]
                curves.append(np.array(found) / reference[task])
            chosen.append(knob)
            accuracy.append(accurate(knob, "test"))
        curve = tuple(np.mean(curves, 0).tolist()) if curves else ()
        return self._result(
            row, tuple(chosen), row.knobs, curve, np.array(accuracy), began
        )

    def _result(self, row, chosen, grid, curve, accuracy, began) -> Result:
        reference = self.reference(row.experts, "test", linear=row.linear)
        trained = tree.size(self.zoo.base)
        # The tangent model is evaluated at its origin: that has to be kept as well.
        origin = 32 * trained if row.linear else 0
        fresh = self.evaluator.computed > began[1]
        return Result(
            row=row,
            chosen=chosen,
            grid=tuple(grid),
            curve=curve,
            accuracy=accuracy,
            normalised=accuracy / reference,
            bits=origin
            + row.bits(len(self.zoo.tasks), trained, tree.size(self.zoo.frozen)),
            seconds=time.monotonic() - began[0] if fresh else None,
        )


def cosine_matrix(taus: chex.ArrayTree) -> np.ndarray:
    """[T, T] cosines between whole task vectors."""
    gram = np.asarray(jax.jit(tree.gram)(taus), np.float64)
    norms = np.sqrt(np.diag(gram))
    return gram / np.maximum(np.outer(norms, norms), 1e-30)


def _add_accuracy(study: Study) -> None:
    """The main table."""
    names, results = study.names, study.results
    study.report.add_table(
        report.Table(
            title="Test accuracy",
            columns=("method", "mean", "normalised", "storage", *names, "scale"),
            rows=tuple(
                (
                    name,
                    float(r.accuracy.mean()),
                    float(r.normalised.mean()),
                    r.bits / 8,
                    *map(float, r.accuracy),
                    _scales(r),
                )
                for name, r in results.items()
            ),
            formats={
                **dict.fromkeys((*names, "mean", "normalised"), ".1%"),
                "storage": "bytes",
            },
            best={"normalised": "max"},
            caption="Scales and knobs chosen on validation rows; storage of all that "
            "is needed to serve every task, in float32 weights and packed bits. "
            "A star: an end of the grid.",
        )
    )


def _add_details(study: Study) -> None:
    """Normalised accuracy, and the figures that every merging study has."""
    names, results = study.names, study.results
    study.report.add_table(
        report.Table(
            title="Normalised accuracy (accuracy / accuracy of the task's own expert)",
            columns=("method", "mean", *names, "seconds"),
            rows=tuple(
                (name, float(r.normalised.mean()), *map(float, r.normalised), r.seconds)
                for name, r in results.items()
            ),
            formats={**dict.fromkeys((*names, "mean"), ".1%"), "seconds": ".1f"},
        )
    )
    study.report.add_figure(
        "Accuracy per task",
        report.Bars(
            labels=names,
            series={name: r.accuracy.tolist() for name, r in results.items()},
            y_label="test accuracy",
        ),
    )
    _curves(study)
    for kind, taus in study.taus.items():
        study.report.add_figure(
            f"Cosine similarity of task vectors ({kind} experts)",
            report.Heatmap(
                rows=names,
                columns=names,
                values=cosine_matrix(taus).tolist(),
                value_range=(-1.0, 1.0),
            ),
        )


def _scales(result: Result) -> str:
    """Chosen scales; a star where an end of the grid won, so that more may be found."""
    ends = {max(result.grid)} if len(result.grid) > 1 else set()
    if isinstance(result.row, TaskModels):
        ends |= {min(result.grid)} if len(result.grid) > 1 else set()
    return " ".join(f"{x:g}{'*' if x in ends else ''}" for x in result.chosen)


def _curves(study: Study) -> None:
    """One figure per grid, since curves of a figure share their axis."""
    by_grid: dict[tuple[tuple[float, ...], bool], list[str]] = {}
    for name, result in study.results.items():
        if result.curve:
            shared = not isinstance(result.row, TaskModels)
            by_grid.setdefault((result.grid, shared), []).append(name)
    for (grid, shared), rows in by_grid.items():
        over = "the scale" if shared else "lambda, which each task chooses for itself"
        chosen = {name: study.results[name].chosen[0] for name in rows if shared}
        study.report.add_figure(
            f"{', '.join(rows)}: validation score over {over}",
            report.Lines(
                x=grid,
                series={name: study.results[name].curve for name in rows},
                chosen=chosen,
                x_label="scale" if shared else "lambda",
                y_label="mean normalised accuracy",
            ),
        )


def write(study: Study, workdir: epath.Path) -> None:
    """Adds what every study shows, writes the report, and prints its tables."""
    study.write(
        workdir,
        table=lambda: _add_accuracy(study),
        rests_on="One seed of one small suite; RESULTS.md has several.",
        details=lambda: _add_details(study),
    )
