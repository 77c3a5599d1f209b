"""Trains one method on one problem with one seed; the result is remembered."""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mtl_jax import data, train
from mtl_jax.data import wheels
from mtl_jax.multitask import provenance
from mtl_jax.multitask.methods import Measure, Method
from mtl_jax.multitask.problem import Problem, Rows, take
from mtl_jax.train import optim

_FORMAT = 2  # Part of every address: raise it when an outcome's file changes meaning.
REUSE = ("same code", "any code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How every method of a comparison is trained.

    Attributes:
      steps: optimizer steps.
      batch_size: examples per step.
      optimizer: what `train.optim.over_steps` takes.
    """

    steps: int
    batch_size: int
    optimizer: Mapping[str, Any]

    def __post_init__(self):
        for name, found in (("steps", self.steps), ("batch_size", self.batch_size)):
            if found < 1:
                raise ValueError(f"Settings: {name} wants at least 1, found {found}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one training.

    Attributes:
      validation: metric of every task on validation rows.
      test: the same on test rows.
      history: metrics of the training, by name: one number per record.
      measured: what was measured at the end, by name.
      step_seconds: median time from step to step, compilation left out.
      remembered: whether it was read and not trained.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    history: Mapping[str, tuple[float, ...]]
    step_seconds: float
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    remembered: bool = False


class Bench:
    """Trains methods on a problem; the same question is computed once.

    Args:
      problem: tasks, rows and model.
      settings: how all methods are trained.
      measures: name -> `measure(problem, params) -> float`; see `Contest`.
      mesh: where; see `train.Trainer`.
      remember: read and write the file of outcomes.
      reuse: which of them are read. "same code": those of the very source and versions
        of libraries that run now, see `provenance`; a changed comment counts as well.
        "any code": where there is none, the newest of any other.
      progress: a `report.Progress`.
      folder: where outcomes are kept; by default inside the package cache.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        *,
        measures: Mapping[str, Measure] | None = None,
        mesh: Mesh | None = None,
        remember: bool = True,
        reuse: str = "same code",
        progress: Any,
        folder: Any = None,
    ):
        if reuse not in REUSE:
            raise ValueError(f"bench: reuse is {reuse!r}, wanted one of {REUSE}")
        self.reuse = reuse
        self.problem = problem
        self.settings = settings
        self.measures = dict(measures or {})
        self.mesh = mesh
        self.progress = progress
        folder = epath.Path(folder or wheels.cache_dir() / "multitask")
        self._folder = folder if remember else None
        self._digest = problem.digest()
        self._trainers: dict[int, tuple[Any, ...]] = {}

    def run(self, method: Method, seed: int) -> Outcome:
        """Trains a method, or reads what came of it before.

        Args:
          method: what to train.
          seed: of initial parameters, data order and keys.
        """
        path = self._path(method, seed)
        found = _read(path)
        if found is None and self.reuse == "any code":
            found = self._of_other_code(method, seed, path)
        if found is None:
            found = self._train(method, seed)
            _write(path, found)
        return found

    def _train(self, method: Method, seed: int) -> Outcome:
        settings = self.settings
        problem, trainer = self._trainer(method)
        batches = self._batches(problem, seed, method.draws)
        clock = []
        with self.progress.task(f"{method.name}, seed {seed}", settings.steps) as bar:

            def advance(step, steps, metrics):
                clock.append(time.monotonic())
                bar(step, steps, metrics)

            result = trainer.fit(
                batches,
                steps=settings.steps,
                seed=seed,
                params=problem.start(seed),
                progress=advance,
            )
        names = sorted(result.history[-1].keys() - {"step"})
        return Outcome(
            validation=problem.evaluate(result.params, "validation"),
            test=problem.evaluate(result.params, "test"),
            history={n: tuple(float(r[n]) for r in result.history) for n in names},
            measured={
                name: float(measure(problem, result.params))
                for name, measure in self.measures.items()
            },
            step_seconds=float(np.median(np.diff(clock))) if len(clock) > 1 else 0.0,
        )

    def _batches(
        self, problem: Problem, seed: int, draws: int = 1
    ) -> Callable[[int], Rows]:
        """`batch(step)`; with rows of their own, as many of every task each time.

        A task that a batch lacked would have no gradient, and methods such as MGDA
        would stand still for it. Tasks alone get as many rows as they have together.
        """
        rows, size = problem.splits["train"], self.settings.batch_size
        steps: Any
        if not problem.own_rows:
            source = data.ArraySource(rows)
            steps = data.pipeline(source, batch_size=draws * size, seed=seed)
            return steps.__getitem__
        count = len(self.problem.targets)
        if size < count:
            raise ValueError(
                f"bench: batch_size wants at least a row for each of {count} tasks, "
                f"found {size}"
            )
        sources = [
            data.ArraySource({k: x[rows["task"] == t] for k, x in rows.items()})
            for t in range(len(problem.targets))
        ]
        steps = data.lockstep(sources, batch_size=draws * (size // count), seed=seed)

        def batch(step):
            return {k: x.reshape(-1, *x.shape[2:]) for k, x in steps[step].items()}

        return batch

    def release(self) -> None:
        """Lets go of compiled methods: a process has room for so many programs only."""
        self._trainers.clear()

    def _trainer(self, method: Method) -> tuple[Problem, train.Trainer]:
        """Compiled once for all seeds; the method is kept, so that its id stays its."""
        if id(method) not in self._trainers:
            problem, settings = self.problem, self.settings
            if method.tasks is not None:
                problem = take(problem, method.tasks)
            tx = optim.over_steps(settings.steps, settings.optimizer)
            trainer = train.Trainer(method.make(problem, tx), mesh=self.mesh)
            self._trainers[id(method)] = (method, problem, trainer)
        return self._trainers[id(method)][1:]

    def _path(self, method: Method, seed: int) -> epath.Path | None:
        if self._folder is None:
            return None
        about = {
            "format": _FORMAT,
            "problem": self._digest,
            "settings": dataclasses.asdict(self.settings),
            "method": dict(method.about),
            "tasks": method.tasks,
            "measures": sorted(self.measures),
            "seed": seed,
        }
        text = json.dumps(about, sort_keys=True, default=_refuse)
        measured = {n: provenance.function_digest(f) for n, f in self.measures.items()}
        code = json.dumps([provenance.package_digest(), method.code, measured])
        return self._folder / f"{_short(text, 24)}-{_short(code, 12)}.json"

    def _of_other_code(self, method: Method, seed: int, path: Any) -> Outcome | None:
        """The newest outcome of the same question."""
        if path is None:
            return None
        others = path.parent.glob(f"{path.name.split('-')[0]}-*.json")
        for other in sorted(others, key=lambda p: p.stat().mtime, reverse=True):
            found = _read(other)
            if found is not None:
                self.progress.log(f"{method.name}, seed {seed}: of other code")
                return found
        return None


def _short(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _refuse(value: Any) -> Any:
    raise ValueError(f"Method.about wants plain data, found {value!r}")


def _read(path: epath.Path | None) -> Outcome | None:
    """What was found before; what is damaged is found again."""
    if path is None or not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        found["history"] = {k: tuple(v) for k, v in found["history"].items()}
        return Outcome(**{**found, "remembered": True})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: epath.Path | None, outcome: Outcome) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    partial.write_text(json.dumps(dataclasses.asdict(outcome)))
    partial.replace(path)
