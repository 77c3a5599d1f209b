"""What a merging method is to a study: rows that turn task vectors into models.

A row is one line of the table that compares methods. It says how to get from the
task vectors of the experts to the difference that is added to the base, and which
settings may be tuned on validation data; the study does the rest, the same for all.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax

from mtl_jax.transforms import merging
from mtl_jax.zoo.material import Material

Chosen = Mapping[str, tuple[float, ...]]
"""What validation chose for the rows before: one scale per model of that row."""


def _shared_bits(num_tasks: int, trained: int, frozen: int) -> int:
    """One model of float32 weights."""
    del num_tasks
    return 32 * (trained + frozen)


def _individual_bits(num_tasks: int, trained: int, frozen: int) -> int:
    """One set of trained weights per task, the frozen ones once."""
    return 32 * (num_tasks * trained + frozen)


def _check_grid(row: str, name: str, grid: tuple[float, ...]) -> None:
    if not grid or not all(
        isinstance(x, numbers.Real) and math.isfinite(x) for x in grid
    ):
        raise ValueError(
            f"row {row!r}: {name} wants one or more finite numbers, found {grid}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedModel:
    """One model for all tasks: `base + scale * delta(taus, chosen)`.

    Attributes:
      name: unique in the study.
      delta: `delta(taus, chosen) -> params-shaped tree`; taus have leaves [T, ...],
        `chosen` holds the scales of the rows before this one.
      scales: grid; the scale with the best mean normalised accuracy on validation
        data is used. A single value is used as it is.
      bits: `bits(T, trained, frozen) -> int`, storage of what serves all tasks.
      linear: evaluate in the tangent space of the base model.
      experts: which set of experts the task vectors come from.
    """

    name: str
    delta: Callable[[chex.ArrayTree, Chosen], chex.ArrayTree]
    scales: tuple[float, ...] = (1.0,)
    bits: Callable[[int, int, int], int] = _shared_bits
    linear: bool = False
    experts: str = "standard"

    def __post_init__(self):
        _check_grid(self.name, "scales", self.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskModels:
    """One model per task: `base + delta(prepare(taus, chosen), task, knob)`.

    Attributes:
      name: unique in the study.
      prepare: `prepare(taus, chosen) -> state`, what all tasks and knobs share.
      delta: `delta(state, task, knob) -> params-shaped tree`.
      knobs: grid of a setting that is chosen per task, by that task's accuracy on
        validation data.
      bits: storage of what serves all tasks.
      linear: evaluate in the tangent space of the base model.
      experts: which set of experts the task vectors come from.
    """

    name: str
    prepare: Callable[[chex.ArrayTree, Chosen], Any]
    delta: Callable[[Any, int, float], chex.ArrayTree]
    knobs: tuple[float, ...] = (1.0,)
    bits: Callable[[int, int, int], int] = _individual_bits
    linear: bool = False
    experts: str = "standard"

    def __post_init__(self):
        _check_grid(self.name, "knobs", self.knobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What a merge that learns ends with: weights, or weights with a way to use them.

    Exactly one of `delta`, `task_delta` and `features` is given.

    Attributes:
      delta: params-shaped tree; one model for all tasks, `base + scale * delta`.
      task_delta: `task_delta(task) -> params-shaped tree`; one model per task.
      features: `features(params, inputs, task) -> [B, D]`, in the place of the
        encoder's own, with `task` a traced integer: routed and corrected models.
      params: tree of arrays that `features` takes.
      details: whatever analyses of the system want, such as coefficients by step;
        alone of all this it is kept in the study's result.
    """

    delta: Any = None
    task_delta: Callable[[int], chex.ArrayTree] | None = None
    features: Callable[[Any, Any, Any], chex.Array] | None = None
    params: Any = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        forms = (self.delta, self.task_delta, self.features)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("Fit: wants one of delta, task_delta and features")
        if (self.features is None) != (self.params is None):
            raise ValueError("Fit: params are what features take; wants both or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedModel:
    """A merge that learns from rows: `fit(taus, chosen, material)`.

    The rows of any split may be seen without their labels; labels only of training and
    validation rows, and only where `labels` says so (see `Material`).

    Attributes:
      name: unique in the study.
      fit: `fit(taus, chosen, material) -> Fit`.
      labels: whether it learns from labels.
      scales: grid of a strength of the whole difference, chosen on validation data as
        that of a `SharedModel`; one value for a fit that is not one `delta`.
      bits: `bits(T, trained, frozen) -> int`, storage of what serves all tasks; not
        asked where the fit is `features`, whose arrays are counted as they are.
      linear: learn and evaluate in the tangent space of the base model.
      experts: which set of experts the task vectors come from.
    """

    name: str
    fit: Callable[[chex.ArrayTree, Chosen, Material], Fit]
    labels: bool = False
    scales: tuple[float, ...] = (1.0,)
    bits: Callable[[int, int, int], int] = _shared_bits
    linear: bool = False
    experts: str = "standard"

    def __post_init__(self):
        _check_grid(self.name, "scales", self.scales)


Row = SharedModel | TaskModels | LearnedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostHoc:
    """A system that edits trained parameters.

    Attributes:
      rows: the lines of the comparison, in order; a row may use what was chosen for
        the rows above it.
      analyses: `analysis(study) -> None`, called in order after the table; each adds
        its own sections to `study.report`.
    """

    rows: tuple[Row, ...]
    analyses: tuple[Callable[[Any], None], ...] = ()

    def __post_init__(self):
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"PostHoc: rows wants unique names, found {twice} twice")


def individual(name: str = "fine-tuned", **options: Any) -> TaskModels:
    """The experts themselves, one per task: the reference for normalised accuracy."""
    return TaskModels(
        name=name,
        prepare=lambda taus, chosen: taus,
        delta=lambda taus, task, knob: task_delta(taus, task),
        **options,
    )


def zero_shot(name: str = "zero-shot", **options: Any) -> SharedModel:
    """The base model as it is."""
    return SharedModel(
        name=name,
        delta=lambda taus, chosen: task_delta(taus, 0),
        scales=(0.0,),
        **options,
    )


def baselines(
    scales: tuple[float, ...], sparse_scales: tuple[float, ...]
) -> tuple[Row, ...]:
    """What every merging method is compared with.

    Args:
      scales: grid of task arithmetic.
      sparse_scales: grid of TIES (density 0.2 over the whole vector, disjoint mean).

    Returns:
      Zero-shot, fine-tuned, average, task arithmetic and TIES.
    """
    return (
        zero_shot(),
        individual(),
        SharedModel(name="average", delta=lambda taus, _: merging.average(taus)),
        SharedModel(
            name="task arithmetic",
            delta=lambda taus, _: merging.task_arithmetic(taus),
            scales=scales,
        ),
        SharedModel(
            name="TIES",
            delta=lambda taus, _: merging.ties(taus, density=0.2, scope="global"),
            scales=sparse_scales,
        ),
    )


@jax.jit
def task_delta(tree: chex.ArrayTree, task: int) -> chex.ArrayTree:
    """One task of a task tree; compiled once for all tasks."""
    return jax.tree.map(lambda x: x[task], tree)
