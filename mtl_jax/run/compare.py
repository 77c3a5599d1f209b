"""A comparison of training methods: every row trained alike, over seeds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import metrics, report
from mtl_jax.multitask import (
    Bench,
    Contest,
    Method,
    Outcome,
    Row,
    baselines,
    single,
)
from mtl_jax.run.experiment import Experiment, mean_and_spread

SINGLE = "single tasks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one row.

    Attributes:
      name: of the row.
      outcomes: one per seed.
      chosen: name of the candidate that validation chose, per seed.
      delta: [S], mean relative change against the single tasks on test data, percent;
        higher is better.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    chosen: tuple[str, ...]
    delta: np.ndarray

    def values(self, task: str) -> np.ndarray:
        """[S] test metric of a task."""
        return np.array([outcome.test[task] for outcome in self.outcomes])

    def last(self, name: str) -> np.ndarray:
        """[S] what was measured at the end, or the mean of a training metric.

        The mean is over the second half of the records; NaN where there is neither.
        """
        return np.array([_last(outcome, name) for outcome in self.outcomes])


def _last(outcome: Outcome, name: str) -> float:
    if name in outcome.measured:
        return outcome.measured[name]
    curve = outcome.history.get(name, ())
    return float(np.mean(curve[len(curve) // 2 :])) if curve else float("nan")


_COLUMNS = 8  # tasks with a column of their own


class Comparison(Experiment):
    """A bench, seeds, and the results so far; what analyses work on.

    Attributes, beside those of every `Experiment`:
      bench: trains.
      problem: what it trains on.
      seeds: of initial parameters and data order.
    """

    results: dict[str, Result]

    def __init__(
        self,
        bench: Bench,
        config: ConfigDict,
        document: report.Report,
        progress: report.Progress,
    ):
        super().__init__(config, document, progress)
        self.bench = bench
        self.problem = bench.problem
        self.seeds = tuple(config.seeds)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(
                f"comparison: seeds wants one or more, each once; found {self.seeds}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Task names."""
        return self.problem.task_names

    def run(self, contest: Contest) -> None:
        """Trains and measures single tasks, baselines and rows, then the analyses."""
        fixed = baselines(len(self.names), self.config.study.get("tuning_steps", 1))
        rows = (*fixed, *contest.rows)
        with self.progress.task("methods", total=1 + len(rows)) as bar:
            methods = [single(name) for name in self.names]
            alone = tuple(self._single(methods, seed) for seed in self.seeds)
            self.results[SINGLE] = Result(
                name=SINGLE,
                outcomes=alone,
                chosen=(SINGLE,) * len(alone),
                delta=np.zeros(len(alone)),
            )
            bar.advance(method=SINGLE)
            for row in rows:
                self.bench.release()
                found = self._row(row)
                self.results[row.name] = found
                bar.advance(method=row.name, delta=float(np.mean(found.delta)))
        for analysis in contest.analyses:
            analysis(self)

    def delta(self, outcome: Outcome, seed: int, split: str = "test") -> float:
        """Mean relative change against the single tasks of a seed, percent."""
        reference = self.results[SINGLE].outcomes[self.seeds.index(seed)]
        found, alone = getattr(outcome, split), getattr(reference, split)
        targets = self.problem.targets
        return float(
            metrics.delta_p(
                {t.name: {t.metric: found[t.name]} for t in targets},
                {t.name: {t.metric: alone[t.name]} for t in targets},
                {t.name: {t.metric: t.higher_is_better} for t in targets},
            ).task
        )

    def _single(self, methods: Sequence[Method], seed: int) -> Outcome:
        """All tasks alone, as one outcome; the time is that of all of them."""
        found = [self.bench.run(method, seed) for method in methods]
        return Outcome(
            validation={k: v for o in found for k, v in o.validation.items()},
            test={k: v for o in found for k, v in o.test.items()},
            history={},
            step_seconds=sum(o.step_seconds for o in found),
            remembered=all(o.remembered for o in found),
        )

    def _row(self, row: Row) -> Result:
        outcomes, chosen = [], []
        total = len(self.seeds) * len(row.candidates)
        with self.progress.task(row.name, total=total) as bar:
            for seed in self.seeds:
                tried = []
                for method in row.candidates:
                    tried.append(self.bench.run(method, seed))
                    bar.advance()
                scores = [self.delta(o, seed, "validation") for o in tried]
                best = int(np.argmax(scores))
                outcomes.append(tried[best])
                chosen.append(row.candidates[best].name)
        delta = [self.delta(o, s) for o, s in zip(outcomes, self.seeds, strict=True)]
        return Result(
            name=row.name,
            outcomes=tuple(outcomes),
            chosen=tuple(chosen),
            delta=np.array(delta),
        )

    def wins(self, first: str, second: str) -> tuple[int, float]:
        """(seeds in which a row's delta is at least another's, mean difference)."""
        gap = self.results[first].delta - self.results[second].delta
        return int(np.sum(gap >= 0)), float(np.mean(gap))


def _shown(comparison: Comparison, task: str, values: np.ndarray) -> str:
    """A metric for the table: accuracies in percent."""
    target = comparison.problem.targets[comparison.names.index(task)]
    percent = target.metric in ("accuracy", "auc")
    return mean_and_spread(values * 100 if percent else values, 1 if percent else 3)


def _task_columns(comparison: Comparison) -> dict[str, Callable[[Result], Any]]:
    """A column per task; of many tasks the mean, and the one that suffers most."""
    targets = comparison.problem.targets
    if len(targets) <= _COLUMNS:
        return {
            f"{t.name} ({t.metric})": lambda r, t=t: _shown(
                comparison, t.name, r.values(t.name)
            )
            for t in targets
        }
    alone = comparison.results[SINGLE]

    def worst(result):
        changes = [
            (1 if t.higher_is_better else -1)
            * (result.values(t.name) / alone.values(t.name) - 1)
            for t in targets
        ]
        return mean_and_spread(100 * np.min(changes, 0), 1)

    def mean(result, metric):
        names = [t.name for t in targets if t.metric == metric]
        values = np.mean([result.values(name) for name in names], 0)
        return _shown(comparison, names[0], values)

    kinds = dict.fromkeys(t.metric for t in targets)
    means = {f"mean {k}": lambda r, k=k: mean(r, k) for k in kinds}
    return {**means, "worst task, change": worst}


def _add_table(comparison: Comparison) -> None:
    results = comparison.results
    equal = results["equal weights"]
    pace = np.mean([o.step_seconds for o in equal.outcomes])
    tasks = _task_columns(comparison)
    measures = tuple(comparison.bench.measures)
    comparison.report.add_table(
        report.Table(
            title="Test metrics",
            columns=(
                "method",
                "delta",
                *tasks,
                *measures,
                "time per step",
                "conflicts",
                "chosen",
            ),
            rows=tuple(
                (
                    name,
                    mean_and_spread(r.delta, 2),
                    *(column(r) for column in tasks.values()),
                    *(_share(r.last(name), "{:.3g}") for name in measures),
                    float(np.mean([o.step_seconds for o in r.outcomes]) / pace),
                    _share(r.last("conflict_rate"), "{:.0%}"),
                    ", ".join(sorted(set(r.chosen) - {name})),
                )
                for name, r in results.items()
            ),
            formats={"time per step": ".2f"},
            caption="Mean and standard deviation over "
            f"{len(comparison.seeds)} seeds. Delta: mean relative change against the "
            "single tasks, percent, positive is better. Time per step: relative to "
            "equal weights, measured beside whatever else the machine did. Conflicts: "
            "share of task pairs whose gradients point apart, second half of training.",
        )
    )


def _share(values: np.ndarray, shape: str) -> str | None:
    return None if np.isnan(values).any() else shape.format(np.mean(values))


def _add_figures(comparison: Comparison) -> None:
    results, document = comparison.results, comparison.report
    names = [name for name in results if name != SINGLE]
    document.add_figure(
        "Change against single tasks",
        report.Bars(
            labels=names,
            series={"delta": [float(results[n].delta.mean()) for n in names]},
            errors={"delta": [_spread(results[n].delta) for n in names]},
            y_label="mean relative change, %",
        ),
    )
    for metric, label in (
        ("conflict_rate", "share of conflicting task pairs"),
        ("loss", "training loss"),
    ):
        found = {n: [_curve(o, metric) for o in r.outcomes] for n, r in results.items()}
        curves = {
            name: np.mean(each, 0).tolist() for name, each in found.items() if all(each)
        }
        if curves:
            length = len(next(iter(curves.values())))
            steps = np.linspace(0, comparison.bench.settings.steps, length + 1)[1:]
            document.add_figure(
                f"{label.capitalize()} over the training",
                report.Lines(
                    x=steps.tolist(), series=curves, x_label="step", y_label=label
                ),
            )


def _curve(outcome: Outcome, metric: str) -> tuple[float, ...]:
    """Of the training; of a loss with more in it, the part that all methods have."""
    history = outcome.history
    if metric != "loss" or "task_loss" in history or "penalty" not in history:
        return history.get(f"task_{metric}", history.get(metric, ()))
    pairs = zip(history["loss"], history["penalty"], strict=True)
    return tuple(loss - penalty for loss, penalty in pairs)


def _spread(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def write(comparison: Comparison, workdir: epath.Path) -> None:
    """Adds what every comparison shows, writes the report, and prints its tables."""
    comparison.write(
        workdir,
        table=lambda: _add_table(comparison),
        rests_on=f"{len(comparison.seeds)} seeds.",
        details=lambda: _add_figures(comparison),
    )
