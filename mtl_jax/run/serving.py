"""A study of language models that are steered while they run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import models, report
from mtl_jax.run import language_preflight
from mtl_jax.run.experiment import Experiment, mean_and_spread
from mtl_jax.zoo import serving
from mtl_jax.zoo.serving_text import Texts

ENSEMBLES: dict[str, Callable[..., serving.Ensemble]] = {
    "strings": serving.Strings,
    "texts": Texts,
}

OUTLINE = "outline"  # Shapes of models, for preflight.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one row.

    Attributes:
      values: [S, D], per seed and domain.
      records: name -> [S, D], means of what the fusion recorded; empty without one.
    """

    values: np.ndarray
    records: dict[str, np.ndarray]

    @property
    def mean(self) -> np.ndarray:
        """[S], over domains."""
        return self.values.mean(1)


class ServingStudy(Experiment):
    """Ensembles over seeds, and the results so far; what analyses work on.

    Attributes, beside those of every `Experiment`:
      domains: names.
      metric: what is measured.
      sign: 1 where more of it is better, -1 where less is.
    """

    results: dict[str, Result]

    def __init__(
        self,
        config: ConfigDict,
        document: report.Report,
        progress: report.Progress,
        mesh: jax.sharding.Mesh,
    ):
        super().__init__(config, document, progress)
        name = config.models.name
        if name == OUTLINE:
            raise ValueError("these models have no weights: mtl-jax preflight only")
        if name not in ENSEMBLES:
            raise ValueError(
                f"models {name!r} do not exist; known: {', '.join(ENSEMBLES)}"
            )
        self.mesh = mesh
        self.domains: tuple[str, ...] = ()
        self.metric, self.sign, self.model = "", 1, ""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of data, weights and order."""
        return tuple(self.config.seeds)

    def run(self, system: serving.Steering) -> None:
        """Trains and measures for every seed, then the analyses."""
        options = self.config.models.to_dict()
        make = ENSEMBLES[options.pop("name")]
        scores: dict[str, list[list[serving.Score]]] = {}
        for seed in self.seeds:
            with self.progress.task(f"seed {seed}", total=len(system.rows)) as bar:
                ensemble = make(
                    **options, seed=seed, mesh=self.mesh, progress=self.progress
                )
                for row in system.rows:
                    found = ensemble.measure(row)
                    scores.setdefault(row.name, []).append(found)
                    bar.advance(method=row.name)
            self.domains, self.metric = ensemble.domains, ensemble.metric
            self.sign = 1 if ensemble.higher_is_better else -1
            self.model = ensemble.name
        for name, rows in scores.items():
            self.results[name] = Result(
                values=np.array([[s.value for s in row] for row in rows]),
                records={
                    key: np.array([[s.records[key] for s in row] for row in rows])
                    for key in rows[0][0].records
                },
            )
        for analysis in system.analyses:
            analysis(self)

    def wins(self, first: str, second: str) -> tuple[int, np.ndarray]:
        """(seeds in which a row is at least as good, by how much [S])."""
        gap = self.sign * (self.results[first].mean - self.results[second].mean)
        return int(np.sum(gap >= 0)), gap


def _add_table(study: ServingStudy) -> None:
    percent = study.metric != "perplexity"
    factor, digits = (100, 1) if percent else (1, 2)
    study.report.add_table(
        report.Table(
            title="Test metrics",
            columns=("method", "mean", *study.domains),
            rows=tuple(
                (
                    name,
                    mean_and_spread(factor * found.mean, digits),
                    *(mean_and_spread(factor * x, digits) for x in found.values.T),
                )
                for name, found in study.results.items()
            ),
            caption=f"{study.model}; {study.metric}{', percent' if percent else ''}, "
            f"mean and standard deviation over {len(study.seeds)} seeds.",
        )
    )


def _add_details(study: ServingStudy) -> None:
    rows = [
        (name, key, *(mean_and_spread(x, 3) for x in values.T))
        for name, found in study.results.items()
        for key, values in found.records.items()
    ]
    if rows:
        study.report.add_table(
            report.Table(
                title="What fusions recorded, mean over tokens",
                columns=("method", "what", *study.domains),
                rows=tuple(rows),
            )
        )
    study.report.add_figure(
        f"{study.metric} by domain",
        report.Bars(
            labels=study.domains,
            series={
                name: found.values.mean(0).tolist()
                for name, found in study.results.items()
            },
            y_label="mean over seeds",
        ),
    )


def run(
    config: ConfigDict,
    system: Any,
    document: report.Report,
    workdir: epath.Path,
    progress: report.Progress,
    mesh: jax.sharding.Mesh,
) -> None:
    """Runs a study of steered models and writes its report to `workdir`."""
    study = ServingStudy(config, document, progress, mesh)
    study.run(system)
    study.write(
        workdir,
        table=lambda: _add_table(study),
        rests_on=f"{len(study.seeds)} seeds.",
        details=lambda: _add_details(study),
    )


def preflight(
    config: ConfigDict,
    system: serving.Steering,
    *,
    topology: str,
    mesh: Mapping[str, int],
    method: str | None = None,
) -> Any:
    """Compiles greedy decoding by a row of the study, for a TPU topology.

    Args:
      config: of the study; `models` has the name "outline", what `large` and `small`
        are, how many `experts` there are, and what to `decode`.
      system: its rows.
      topology: see `train.preflight.preflight`.
      mesh: sizes of the axes.
      method: a row; the last one by default.

    Returns:
      A `train.preflight.PreflightReport`.

    Raises:
      ValueError: as `train.preflight.preflight`, for models that have weights, and for
        a row that does not exist.
    """
    if config.models.name != OUTLINE:
        raise ValueError(
            f"preflight: the models {config.models.name!r} are meant for a CPU; use "
            "the variant :paper"
        )
    rows = {row.name: row for row in system.rows}
    row = rows.get(method) if method is not None else system.rows[-1]
    if row is None:
        raise ValueError(f"preflight: no row {method!r}, known: {', '.join(rows)}")
    large, small = (_outline(config.models[size]) for size in ("large", "small"))
    if row.role == "fused":
        members = [large, small, *[small] * (config.models.experts if row.every else 1)]
    else:
        members = [large if row.role in ("large", "tuned") else small]
    return language_preflight.decoding_report(
        members, config.models.decode, topology=topology, mesh=mesh, fuse=row.fuse
    )


def _outline(options: ConfigDict) -> tuple[models.Decoder, Any]:
    """A decoder by name, and shapes of its parameters."""
    options = options.to_dict()
    return language_preflight.decoder(options.pop("name"), **options)
