"""Model Breadcrumbs: task vectors without their outliers and without their dust."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mtl_jax import report, zoo
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import merging

SPEC = SystemSpec(
    name="model-breadcrumbs",
    title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    year=2023,
    family="merging",
    kind="posthoc",
    summary=(
        "Zeroes the few largest and the many smallest changes of every layer of a task "
        "vector, then adds the cleaned vectors with one strength."
    ),
    reference="""@inproceedings{model-breadcrumbs,
  title = {{Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks}},
  author = {Davari, MohammadReza and Belilovsky, Eugene},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  eprint = {2312.06795},
  archiveprefix = {arXiv}
}""",
    uses=(
        "merging.breadcrumbs",
        "merging.unit_axis",
    ),
    deviations=(
        "A group is the inputs of one unit, as the last axis of the authors' PyTorch "
        "weights is; the paper's prose speaks of layers, which is group='leaf'.",
        "Densities are exact counts with ties kept by index.",
        "Subsets of each size are sampled where there are more than `study.subsets`.",
    ),
)


def _crumbs(name, scales, **options) -> zoo.SharedModel:
    return zoo.SharedModel(
        name=name,
        delta=lambda taus, _: merging.breadcrumbs(
            taus, axis=merging.unit_axis, **options
        ),
        scales=scales,
    )


def build(config: ConfigDict) -> zoo.PostHoc:
    """The paper's method, its ablations and its baselines; then the growth trend."""
    study = config.study
    scales = tuple(study.sparse_scales)
    keep, top = study.density, study.drop_top
    rows = (
        *zoo.baselines(tuple(study.scales), scales),
        _crumbs("breadcrumbs (row)", scales, density=keep, drop_top=top),
        _crumbs("breadcrumbs (leaf)", scales, density=keep, drop_top=top, group="leaf"),
        _crumbs("outliers kept", scales, density=keep, drop_top=0.0),
        _crumbs("outliers only dropped", scales, density=1.0, drop_top=top),
    )
    return zoo.PostHoc(rows=rows, analyses=(_claims, _growth))


def _claims(study) -> None:
    """At equal density, dropping the outliers helps; what pruning itself costs."""
    score = {name: r.normalised.mean() for name, r in study.results.items()}
    for text, better, worse in (
        (
            "At equal density, dropping the largest changes helps",
            "breadcrumbs (row)",
            "outliers kept",
        ),
        ("Breadcrumbs beats task arithmetic", "breadcrumbs (row)", "task arithmetic"),
        ("Breadcrumbs beats TIES", "breadcrumbs (row)", "TIES"),
    ):
        gain = score[better] - score[worse]
        study.claim(text, f"{gain:+.1%} normalised accuracy", gain > 0)


def _growth(study) -> None:
    """Settings frozen on pairs of tasks, on ever more tasks, against re-tuned ones."""
    config, taus = study.config.study, study.taus["standard"]
    count = len(study.names)
    methods = {
        "breadcrumbs": [(b, g) for b in config.densities for g in config.drop_tops],
        "task arithmetic": [(1.0, 0.0)],
    }
    sizes = [n for n in config.growth_sizes if 2 <= n <= count]
    if len(sizes) < 2:
        raise ValueError(
            f"model-breadcrumbs: study.growth_sizes wants two sizes from 2 to {count}, "
            f"found {sizes} of {list(config.growth_sizes)}"
        )
    subsets = {n: _subsets(count, n, config.subsets, config.seed) for n in sizes}

    grids = {"breadcrumbs": config.sparse_scales, "task arithmetic": config.scales}

    def score(tasks, band, scales, split) -> list[float]:
        part = jax.tree.map(lambda x: x[jnp.array(tasks)], taus)
        delta = merging.breadcrumbs(
            part, density=band[0], drop_top=band[1], axis=merging.unit_axis
        )
        return [study.score(delta, scale, split, tasks) for scale in scales]

    def tune(name, groups, bands):
        """(score, scale, band) with the best mean over groups of tasks."""
        grid, found = grids[name], []
        for band in bands:
            scores = [score(tasks, band, grid, "validation") for tasks in groups]
            means = np.mean(scores, axis=0)
            best = int(np.argmax(means))
            found.append((float(means[best]), grid[best], band))
        return max(found)

    series, rows = {}, []
    with study.progress.task("growth of the task set", total=len(methods)) as bar:
        for name, bands in methods.items():
            _, scale, band = tune(name, subsets[sizes[0]], bands)
            series[name] = [
                float(np.mean([score(s, band, [scale], "test") for s in subsets[n]]))
                for n in sizes
            ]
            _, new_scale, new_band = tune(name, subsets[sizes[-1]], bands)
            again = [
                score(s, new_band, [new_scale], "test") for s in subsets[sizes[-1]]
            ]
            rows.append((name, *band, scale, series[name][-1], float(np.mean(again))))
            bar.advance(method=name)
    _report_growth(study, sizes, series, rows)


def _subsets(count: int, size: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """All subsets of that size, or `most` of them at random."""
    every = list(itertools.combinations(range(count), size))
    if len(every) <= most:
        return every
    chosen = np.random.default_rng(seed).choice(len(every), most, replace=False)
    return [every[i] for i in sorted(chosen)]


def _report_growth(study, sizes, series, rows) -> None:
    study.report.add_figure(
        "Merging more tasks with settings frozen on pairs",
        report.Lines(
            x=sizes,
            series=series,
            x_label="number of merged tasks",
            y_label="normalised accuracy on the merged tasks",
        ),
    )
    study.report.add_table(
        report.Table(
            title=f"Frozen on {sizes[0]} tasks against re-tuned on {sizes[-1]}",
            columns=("method", "density", "drop_top", "scale", "frozen", "re-tuned"),
            rows=tuple(rows),
            formats={"frozen": ".1%", "re-tuned": ".1%"},
        )
    )
    loss = rows[0][-1] - rows[0][-2]
    study.claim(
        f"Settings tuned on {sizes[0]} tasks stay valid for {sizes[-1]} "
        "(at most 2 points lost)",
        f"{-loss:+.1%} normalised accuracy against re-tuning",
        loss <= 0.02,
    )
