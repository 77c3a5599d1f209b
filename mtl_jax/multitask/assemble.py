"""Problems from plain data: rows by name, an architecture with its parts by name."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from mtl_jax import data, models
from mtl_jax.multitask import minilm
from mtl_jax.multitask.problem import Problem

ARCHITECTURES: dict[str, type[models.multitask.MultiTaskModule]] = {
    "cgc": models.multitask.CGC,
    "cross_stitch": models.multitask.CrossStitch,
    "dselect_k": models.multitask.DSelectK,
    "hard_sharing": models.multitask.HardSharing,
    "ltb": models.multitask.LTB,
    "mmoe": models.multitask.MMoE,
    "mtan": models.multitask.MTAN,
    "ple": models.multitask.PLE,
}
_PARTS = ("backbone", "expert", "levels", "stages", "stem")


def build(
    architecture: str, outputs: Mapping[str, int], **options: Any
) -> models.multitask.MultiTaskModule:
    """Makes an architecture by name.

    Args:
      architecture: a key of `ARCHITECTURES`.
      outputs: task name -> width of its output.
      **options: attributes of the module. Parts are given as `{"model": name, ...}`,
        what `models.build` takes, or as a sequence of such.

    Raises:
      ValueError: a name or an option that does not exist.

    >>> model = build("hard_sharing", {"a": 1}, backbone={"model": "mlp",
    ...                                                   "features": (4,)})
    >>> model.task_names
    ('a',)
    """
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"build: no architecture {architecture!r}{hint}, known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module = ARCHITECTURES[architecture]
    known = {f.name for f in dataclasses.fields(module)} - {"parent", "name", "outputs"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"build: {architecture!r} has no option {', '.join(unknown)}, known: "
            f"{', '.join(sorted(known))}"
        )
    parts = {k: _factory(k, options[k]) for k in options if k in _PARTS}
    return module(outputs=dict(outputs), **{**options, **parts})


def _factory(name: str, part: Any) -> Any:
    if isinstance(part, Mapping):
        if "model" not in part:
            raise ValueError(f"build: {name} lacks 'model', found {dict(part)}")
        options = {key: value for key, value in part.items() if key != "model"}
        models.build(part["model"], **options)  # Errors come now, not in a trace.
        return lambda: models.build(part["model"], **options)
    return tuple(_factory(name, each) for each in part)


def _rules(module: models.multitask.MultiTaskModule, model: Mapping[str, Any]) -> Any:
    """Sharding rules of an architecture and its parts; the rest is replicated."""
    found = [module, *(_factory("part", part)() for part in _parts(model))]
    kinds = {type(each): each for each in found}
    return (*models.sharding_rules(*kinds.values()), (".*", PartitionSpec()))


def _parts(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = [model[name] for name in _PARTS if model.get(name)]
    return [
        p for part in given for p in ([part] if isinstance(part, Mapping) else part)
    ]


def outline(name: str, model: Mapping[str, Any], **options: Any) -> Problem:
    """A problem of the right shapes without its data: one row of zeros a split.

    Args:
      name: see `data.multitask.names()`.
      model: see `build`.
      **options: of `assemble`; limits and pretrained weights are left out.
    """
    about = data.multitask.get(name)
    rows = {
        key: np.zeros((1, *part.shape), part.dtype)
        for key, part in about.inputs.items()
    }
    rows |= {key: np.zeros(1, dtype) for key, dtype in about.labels.items()}
    if options.get("lower"):
        ids = rows.pop("input_ids")
        hidden = np.zeros((*ids.shape, models.Bert().width), np.float32)
        rows = {minilm.HIDDEN: hidden, **rows}
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    kept = {k: options[k] for k in ("lower", "frozen") if k in options}
    return _problem(about, model, splits, None, **kept)


def _problem(
    about: Any,
    model: Mapping[str, Any],
    splits: Any,
    pretrained: str | None,
    lower: int = 0,
    frozen: tuple[str, ...] = (),
) -> Problem:
    module = build(outputs=about.outputs, **model)
    if any(part.get("dropout") for part in _parts(model)):
        raise ValueError(
            f"assemble: {about.name!r}: dropout is never on in the model of a problem; "
            "leave it out"
        )
    return Problem(
        name=about.name,
        targets=about.tasks,
        inputs=tuple(
            minilm.HIDDEN if lower and name == "input_ids" else name
            for name in about.inputs
        ),
        splits=splits,
        model=module,
        about={
            **model,
            "pretrained": pretrained,
            "lower": lower,
            "frozen": list(frozen),
        },
        rules=_rules(module, model),
        frozen=tuple(frozen),
        loaded=functools.partial(minilm.loaded, lower=lower) if pretrained else None,
    )


def assemble(
    name: str,
    model: Mapping[str, Any],
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    pretrained: str | None = None,
    lower: int = 0,
    frozen: tuple[str, ...] = (),
    progress: Any,
) -> Problem:
    """A problem from the data layer and a model.

    Args:
      name: see `data.multitask.names()`.
      model: `architecture` and its options, see `build`.
      train: most rows of the training split; of each task, where tasks have their own.
      validation: most rows of the validation split.
      test: most rows of the test split.
      pretrained: "minilm" starts the sentence encoder from MiniLM's weights.
      lower: so many layers of MiniLM, and its embeddings, run once over all rows and
        are not trained; the model reads what they put out, see `models.Bert.embed`.
      frozen: regexes on leaf paths that are not trained.
      progress: a `report.Progress`.

    Raises:
      ValueError: unknown names and options, or a problem that cannot be had.
    """
    if pretrained not in (None, "minilm"):
        raise ValueError(
            f"assemble: pretrained wants None or 'minilm', found {pretrained!r}"
        )
    if lower and (pretrained is None or not 0 < lower < models.Bert().depth):
        raise ValueError(
            f"assemble: lower={lower} wants pretrained='minilm' and at most "
            f"{models.Bert().depth - 1} layers, found {pretrained!r}"
        )
    about = data.multitask.get(name)
    limits = {"train": train, "validation": validation, "test": test}
    splits = {}
    with progress.task(f"load {name}", total=len(limits)) as bar:
        for split, limit in limits.items():
            splits[split] = data.multitask.load(name, split, limit)
            bar.advance()
    if lower:
        splits = minilm.run_lower(splits, lower)
    return _problem(about, model, splits, pretrained, lower, frozen)
