"""From a config to a run: by the kind of the system it names."""

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import catalog, data, multitask, report, train, zoo
from mtl_jax.run import (
    compare,
    embedding,
    language,
    language_preflight,
    mesh_merge,
    serving,
)
from mtl_jax.run import study as study_lib
from mtl_jax.train import optim

Suite = tuple[zoo.Encoder, tuple[zoo.TaskData, ...]]


def _minilm(options: dict[str, Any], progress: Any) -> Suite:
    encoder = zoo.minilm(max_length=options.pop("max_length", None))
    return encoder, zoo.load_tasks(encoder, **options, progress=progress)


def _small_vit(options: dict[str, Any], progress: Any) -> Suite:
    base = options.pop("base", {})
    encoder = zoo.small_vit(
        tasks=tuple(_option(options, "names")), **base, progress=progress
    )
    return encoder, zoo.load_tasks(encoder, **options, progress=progress)


def _option(options: dict[str, Any], name: str) -> Any:
    if name not in options:
        raise ValueError(f"suite: options lack {name!r}, found {', '.join(options)}")
    return options[name]


def _world(options: dict[str, Any], progress: Any) -> Suite:
    return zoo.world(**options, progress=progress)


def _clip(options: dict[str, Any], progress: Any) -> Suite:
    encoder = zoo.clip(**_option(options, "base"))
    del options["base"]
    zoo.require_weights(encoder, options["names"])
    return encoder, zoo.load_tasks(encoder, **options, progress=progress)


SUITES: dict[str, Callable[[dict[str, Any], Any], Suite]] = {
    "clip": _clip,
    "minilm": _minilm,
    "small_vit": _small_vit,
    "world": _world,
}


def _system(config: ConfigDict) -> tuple[catalog.Entry, Any]:
    entry = catalog.get(config.system)
    if entry.status != "working":
        raise ValueError(f"system {entry.name!r} is planned, not yet there to run")
    return entry, importlib.import_module(entry.module)


_PARTS = {
    "posthoc": ("suite", "experts", "modes", "mesh", "remember", "study"),
    "trainable": (
        "problem",
        "model",
        "training",
        "seeds",
        "mesh",
        "remember",
        "study",
    ),
    "servable": ("models", "seeds", "mesh", "study"),
    "embedding": ("material", "training", "seeds", "mesh", "study"),
}


def _kind(config: ConfigDict, entry: catalog.Entry) -> str:
    """Of the study: that of the system, where the config names no other."""
    kind = config.get("study_kind", entry.spec.kind)
    _lookup("study_kind", _RUNNERS, kind)
    _check_parts(config, kind)
    return kind


def _check_parts(config: ConfigDict, kind: str) -> None:
    missing = [name for name in _PARTS[kind] if name not in config]
    if missing:
        raise ValueError(f"config: lacks {', '.join(missing)}")


def _plain(config: Any) -> dict[str, Any]:
    """Plain dicts; tuples stay tuples."""
    return copy.deepcopy(config.to_dict())


def _lookup(kind: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{kind} {name!r} does not exist; known: {', '.join(table)}")
    return table[name]


def run(config: ConfigDict, *, workdir: Any, progress: Any) -> report.Report:
    """Runs an experiment and writes its report to `workdir`.

    Experts, trainings and measured accuracies are cached by content, so that a run
    that was stopped, or is repeated, does only what is left.

    Args:
      config: names an `experiment`, or the `system` and `study`, what is compared; for
        a system that edits trained parameters, the `suite` of tasks and how `experts`
        are trained; for one that trains, `problem`, `model`, `training` and `seeds`;
        see `experiments/configs`.
      workdir: gets `report/`: `index.html`, and `results.json`, which holds the
        resolved config too. What is cached is kept in the package cache.
      progress: a `report.Progress`.

    Raises:
      ValueError: on a config that names what does not exist.
    """
    if "experiment" in config:
        return _run_experiment(config, epath.Path(workdir), progress)
    if "system" not in config:
        raise ValueError("config: lacks system")
    entry, module = _system(config)
    runner = _RUNNERS[_kind(config, entry)]
    _check_processes()
    document = report.Report(
        entry.spec.title, config.get("intro", entry.spec.summary), config=_plain(config)
    )
    runner(config, module.build(config), document, epath.Path(workdir), progress)
    return document


def _check_processes() -> None:
    if train.initialize():
        raise ValueError(
            "run: studies run in one process, found several; the trainer itself runs "
            "in as many as there are"
        )


def _run_experiment(config: ConfigDict, workdir: Any, progress: Any) -> report.Report:
    """An experiment that is about no system of the catalogue."""
    runner = _lookup("experiment", _EXPERIMENTS, config.experiment)
    _check_processes()
    document = report.Report(config.title, config.intro, config=_plain(config))
    # What trains splits its batch; else any number of devices will do.
    rows = config.training.batch_size if "training" in config else jax.device_count()
    runner(config, document, workdir, progress, _mesh(config, rows))
    return document


def _run_study(
    config: ConfigDict, system: Any, document: Any, workdir: Any, progress: Any
) -> None:
    """Edits trained parameters: experts, rows, report."""
    make_suite = _lookup("suite", SUITES, config.suite.name)
    try:
        encoder, tasks = make_suite(_plain(config.suite.options), progress)
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        raise ValueError(f"suite {config.suite.name!r}: {error}") from error
    opened = zoo.open_zoo(
        encoder,
        tasks,
        zoo.Settings(**_plain(config.experts)),
        modes=tuple(config.modes),
        checkpoint_every=config.get("checkpoint_every"),
        mesh=_mesh(config, config.experts.batch_size),
        progress=progress,
    )
    evaluator = zoo.Evaluator(opened, remember=config.remember, progress=progress)
    study = study_lib.Study(opened, evaluator, config, document, progress)
    study.run(system)
    study_lib.write(study, workdir)


def _run_comparison(
    config: ConfigDict, contest: Any, document: Any, workdir: Any, progress: Any
) -> None:
    """Trains: one problem, methods, seeds, report."""
    options = {**_plain(config.problem), "model": _plain(config.model)}
    bench = multitask.Bench(
        multitask.assemble(**options, progress=progress),
        multitask.Settings(**_plain(config.training)),
        measures=contest.measures,
        mesh=_mesh(config, config.training.batch_size),
        remember=config.remember,
        reuse=config.get("reuse", "same code"),
        progress=progress,
    )
    comparison = compare.Comparison(bench, config, document, progress)
    comparison.run(contest)
    compare.write(comparison, workdir)


def _run_embedding(
    config: ConfigDict, system: Any, document: Any, workdir: Any, progress: Any
) -> None:
    """Merges embedding models: groups of pairs, seeds, report."""
    mesh = _mesh(config, config.training.batch_size)
    embedding.run(config, system, document, workdir, progress, mesh)


def _run_serving(
    config: ConfigDict, system: Any, document: Any, workdir: Any, progress: Any
) -> None:
    """Acts at inference: models, seeds, report."""
    mesh = _mesh(config, config.models.batch_size)
    serving.run(config, system, document, workdir, progress, mesh)


_EXPERIMENTS = {"language": language.run, "mesh_merge": mesh_merge.run}
_PREFLIGHTS = {
    "language": language_preflight.preflight,
    "mesh_merge": mesh_merge.preflight,
}
_RUNNERS = {
    "posthoc": _run_study,
    "trainable": _run_comparison,
    "servable": _run_serving,
    "embedding": _run_embedding,
}


def _mesh(config: ConfigDict, batch_size: int) -> jax.sharding.Mesh:
    """The config's mesh; a free data axis is as large as the batch divides into."""
    axes = _plain(config.mesh)
    devices = jax.devices()
    if axes.get("data", -1) == -1:
        others = math.prod(size for name, size in axes.items() if name != "data")
        most = max(1, len(devices) // max(1, others))
        axes["data"] = max(n for n in range(1, most + 1) if batch_size % n == 0)
    return train.make_mesh(**axes, devices=devices[: math.prod(axes.values())])


def preflight(
    config: ConfigDict,
    *,
    topology: str,
    mesh: dict[str, int] | None = None,
    method: str | None = None,
) -> Any:
    """Compiles the training step of a config, and all kernels, for a TPU topology.

    For a system that edits trained parameters that is the fine-tuning of an expert,
    for one that trains the step of one method of its comparison, for one that acts at
    inference decoding by one of its rows. For a language experiment it is the step that
    trains, or decoding (without kernels).

    Args:
      config: an experiment; one with a suite needs CLIP towers, whose shapes are known
        without weights.
      topology: such as "v5e:4x4".
      mesh: sizes of the axes; the config's by default.
      method: of a comparison: a row, which stands for its first candidate, a candidate
        whose name only one row has, or `ROW/CANDIDATE`; by default the system's own,
        which is the last row. Of what acts at inference: a row, by default the last.

    Returns:
      A `train.preflight.PreflightReport`.

    Raises:
      ValueError: as `train.preflight.preflight`, for another suite, or for a method
        that does not exist.
    """
    from mtl_jax.train import preflight as preflight_lib

    target: Any = {"topology": topology, "mesh": mesh or _plain(config.mesh)}
    if "experiment" in config:
        check = _lookup("experiment", _PREFLIGHTS, config.experiment)
        if method is not None:
            raise ValueError(
                f"preflight: experiment {config.experiment!r} compares no methods, "
                f"found {method!r}"
            )
        return check(config, **target)
    entry, module = _system(config)
    kind = _kind(config, entry)
    if kind == "servable":
        return serving.preflight(config, module.build(config), method=method, **target)
    step = _STEPS[kind]
    trainable, batch = step(config, module, method)
    return preflight_lib.preflight(trainable, batch, **target, with_kernels=True)


def _contest_step(
    config: ConfigDict, module: Any, name: str | None
) -> tuple[train.Trainable, Any]:
    """One method of a comparison, with a batch of its problem."""
    problem = multitask.outline(
        **{**_plain(config.problem), "model": _plain(config.model)}
    )
    training = multitask.Settings(**_plain(config.training))
    fixed = multitask.baselines(
        len(problem.targets), config.study.get("tuning_steps", 1)
    )
    method = find_method((*fixed, *module.build(config).rows), name)
    tx = optim.over_steps(training.steps, training.optimizer)
    batch = {
        name: jax.ShapeDtypeStruct(
            (method.draws * training.batch_size, *x.shape[1:]), x.dtype
        )
        for name, x in problem.splits["train"].items()
    }
    return method.make(problem, tx), batch


def find_method(rows: Sequence[multitask.Row], name: str | None) -> multitask.Method:
    """A method of a comparison by name, see `preflight`.

    Raises:
      ValueError: listing the names, where none or several have this one.
    """
    if name is None:
        return rows[-1].candidates[0]
    named = {row.name: row.candidates[0] for row in rows}
    each = [(row, candidate) for row in rows for candidate in row.candidates]
    named |= {f"{row.name}/{found.name}": found for row, found in each}
    if name in named:
        return named[name]
    found = [candidate for _, candidate in each if candidate.name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(
        row.name
        if len(row.candidates) == 1
        else f"{row.name}/{{{', '.join(method.name for method in row.candidates)}}}"
        for row in rows
    )
    why = f"{len(found)} rows have a candidate" if found else "no method"
    raise ValueError(f"preflight: {why} {name!r}, known: {names}")


def _expert_step(
    config: ConfigDict, module: Any, name: str | None
) -> tuple[train.Trainable, Any]:
    """The fine-tuning of an expert; only towers whose shapes need no weights."""
    del module
    if name is not None:
        raise ValueError(
            "preflight: the step is that of fine-tuning an expert, found method "
            f"{name!r}"
        )
    if config.suite.name != "clip":
        raise ValueError(
            f"preflight: the suite {config.suite.name!r} is meant for a CPU; "
            "use the variant :paper"
        )
    options = _plain(config.suite.options)
    encoder = zoo.clip(**options["base"])
    settings = zoo.Settings(**_plain(config.experts))
    width = max(data.get(name).num_classes for name in options["names"])
    batch = settings.batch_size
    features = jax.eval_shape(
        encoder.features, encoder.params, {"image": _images(encoder, 1)}
    )
    head = {
        "prototypes": jax.ShapeDtypeStruct((width, features.shape[-1]), "float32"),
        "active": jax.ShapeDtypeStruct((width,), "bool"),
    }
    trainable = zoo.trainable(encoder, head, settings, config.modes[-1])
    return trainable, {
        "image": _images(encoder, batch),
        "label": jax.ShapeDtypeStruct((batch,), "int32"),
    }


_STEPS = {
    "posthoc": _expert_step,
    "trainable": _contest_step,
    "embedding": embedding.contrastive_step,
}


def _images(encoder: zoo.Encoder, count: int) -> jax.ShapeDtypeStruct:
    size = encoder.image_size
    return jax.ShapeDtypeStruct((count, size, size, 3), "float32")
