"""A study of merged embedding models: trained apart and together, merged, measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import report, train
from mtl_jax.run.experiment import Experiment, mean_and_spread
from mtl_jax.zoo import embedding
from mtl_jax.zoo.embedding_material import MATERIALS, OUTLINES

BASE, JOINT, BALANCED = "base", "joint training", "balanced training"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one row.

    Attributes:
      values: [S, T] test metric per seed and group.
      kappa: [S, T], coefficients of the task vectors; None where nothing was merged.
      details: per seed, what the merge kept for analyses.
    """

    values: np.ndarray
    kappa: np.ndarray | None = None
    details: tuple[Mapping[str, Any], ...] = ()

    @property
    def mean(self) -> np.ndarray:
        """[S], over groups."""
        return self.values.mean(1)


class EmbeddingStudy(Experiment):
    """Families of embedding models over seeds, and the results so far.

    Attributes, beside those of every `Experiment`:
      groups: names and metrics of the groups.
      norms: per seed and group [K, 2], steps and length of the task vector.
      cosines: per seed, between the vector of joint training and those of the experts.
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
        _known(config)
        self.mesh = mesh
        self.groups: tuple[tuple[str, str], ...] = ()
        self.model = ""
        self.norms: list[list[np.ndarray]] = []
        self.cosines: list[np.ndarray] = []

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of data, weights and order."""
        return tuple(self.config.seeds)

    def family(self, seed: int) -> embedding.Family:
        """Everything that is trained apart."""
        options = self.config.material.options.to_dict()
        material = MATERIALS[self.config.material.name](
            **options, seed=seed, progress=self.progress
        )
        settings = embedding.Settings(**self.config.training.to_dict(), seed=seed)
        return embedding.Family(material, settings, self.mesh, self.progress)

    def run(self, system: embedding.Merges) -> None:
        """Trains, merges and measures for every seed, then the analyses."""
        found: dict[str, list[tuple]] = {}
        for seed in self.seeds:
            with self.progress.task(f"seed {seed}", total=len(system.rows)) as bar:
                for name, *result in self._one(self.family(seed), system, bar):
                    found.setdefault(name, []).append(tuple(result))
        for name, rows in found.items():
            values, kappas, details = zip(*rows, strict=True)
            self.results[name] = Result(
                values=np.array(values),
                kappa=None if kappas[0] is None else np.array(kappas),
                details=details,
            )
        for analysis in system.analyses:
            analysis(self)

    def _one(self, family, system, bar):
        """Of one seed: (row, values [T], kappa, details)."""
        self.groups = tuple((group.name, group.metric) for group in family.groups)
        self.model = family.material.name
        self.norms.append(family.norms)
        yield BASE, family.measure(family.material.base), None, {}
        for (name, _), params in zip(self.groups, family.experts, strict=True):
            yield f"expert: {name}", family.measure(params), None, {}
        joint = family.joint()
        self.cosines.append(family.cosines(joint))
        yield JOINT, family.measure(joint), None, {}
        yield BALANCED, family.measure(family.balanced()), None, {}
        for row in system.rows:
            place = row.place(family)
            kappa = np.asarray(place.kappa, np.float64)
            values = family.measure(family.merged(kappa))
            yield row.name, values, kappa, place.details
            bar.advance(method=row.name, mean=float(values.mean()))

    def wins(self, first: str, second: str) -> tuple[int, np.ndarray]:
        """(seeds in which a row's mean is at least another's, differences [S])."""
        gap = self.results[first].mean - self.results[second].mean
        return int(np.sum(gap >= 0)), gap


def _known(config: ConfigDict) -> None:
    name = config.material.name
    if name not in MATERIALS:
        raise ValueError(
            f"material {name!r} does not exist; known: {', '.join(MATERIALS)}"
        )


def contrastive_step(
    config: ConfigDict, module: Any, method: str | None
) -> tuple[train.Trainable, Any]:
    """The training of an expert without weights, and the shapes of its batch.

    Args:
      config: of the study.
      module: of the system; all train alike.
      method: None; rows of the study merge what this step trained.

    Raises:
      ValueError: a method, or a material that does not exist.
    """
    del module
    if method is not None:
        raise ValueError(
            f"preflight: the step is that of training an expert, found method "
            f"{method!r}"
        )
    _known(config)
    outline = OUTLINES[config.material.name](**config.material.options.to_dict())
    training = config.training
    size = training.batch_size
    trainable = embedding.contrastive(
        embedding.pair_loss(outline.features, training.temperature),
        outline.params,
        training.rate,
        outline.rules,
    )
    return trainable, {
        "first": outline.batch(size),
        "second": outline.batch(size),
        "label": jax.ShapeDtypeStruct((size,), "int32"),
    }


def _add_table(study: EmbeddingStudy) -> None:
    names = [f"{name} ({metric})" for name, metric in study.groups]
    study.report.add_table(
        report.Table(
            title="Test metrics",
            columns=("method", "mean", *names, "coefficients"),
            rows=tuple(
                (
                    name,
                    mean_and_spread(100 * found.mean, 1),
                    *(mean_and_spread(100 * values, 1) for values in found.values.T),
                    ""
                    if found.kappa is None
                    else ", ".join(mean_and_spread(k, 2) for k in found.kappa.T),
                )
                for name, found in study.results.items()
            ),
            caption=f"{study.model}; mean and standard deviation over "
            f"{len(study.seeds)} seeds, in hundredths. Coefficients of the task "
            "vectors in the merge.",
        )
    )


def _add_details(study: EmbeddingStudy) -> None:
    study.report.add_figure(
        "Test metrics by group",
        report.Bars(
            labels=[name for name, _ in study.groups],
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
    """Runs a study of embedding models and writes its report to `workdir`."""
    study = EmbeddingStudy(config, document, progress, mesh)
    study.run(system)
    study.write(
        workdir,
        table=lambda: _add_table(study),
        rests_on=f"{len(study.seeds)} seeds.",
        details=lambda: _add_details(study),
    )
