"""Choosing the strength of a merge on validation data, on the host."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from mtl_jax.transforms.merging import _compose


class Trial(NamedTuple):
    """One scale that was tried: its value, its control and whether it may be chosen."""

    scale: float
    value: float
    control: float | None
    admissible: bool


class ScaleSearch(NamedTuple):
    """The chosen scale, its value, and every trial in the order tried."""

    scale: float
    value: float
    trials: tuple[Trial, ...]


def scale_search(
    eval_fn: Callable[[float], Any],
    grid: Iterable[float],
    objective: Literal["max", "min"] = "max",
    constraint: float | None = None,
) -> ScaleSearch:
    """Tries every scale of a grid and picks the best admissible one.

    Without a constraint `eval_fn` returns one value. With one it returns a pair
    `(value, control)`, and a scale is admissible when its control is at least
    `constraint` times the control at scale 0. Scale 0, the base model, is always tried
    and always admissible. Of equal values the scale nearest to 0 wins.

    Args:
      eval_fn: scale -> value, or (value, control); called once per scale.
      grid: scales to try.
      objective: "max" for accuracies of added tasks; "min" for those of a task to
        forget.
      constraint: fraction of the control at scale 0 to keep, 0.95 in negation.

    Returns:
      `ScaleSearch`.

    Raises:
      ValueError: an objective that does not exist, a scale that is not finite, a
        value that is NaN, or an `eval_fn` that returns no pair under a constraint.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", sections 3
      and 4; the grid of Ortiz-Jimenez et al. 2023 is `numpy.linspace(0, 1, 21)`.
    Differs: scale 0 is added to a grid that lacks it.

    >>> scale_search(lambda scale: -((scale - 0.4) ** 2), [0.2, 0.4, 0.6]).scale
    0.4
    """
    if objective not in ("max", "min"):
        raise ValueError(
            f"scale_search: objective is {objective!r}, wanted 'max' or 'min'"
        )
    grid = [_compose.number("scale_search", "a scale of grid", s) for s in grid]
    if not all(map(math.isfinite, grid)):
        raise ValueError(f"scale_search: grid is {grid}, wanted finite scales")
    scales = [0.0, *(s for s in grid if s != 0.0)]
    trials: list[Trial] = []
    for scale in scales:
        value, control = _evaluate(eval_fn, scale, constraint)
        enough = True
        if constraint is not None and trials:
            enough = control >= constraint * trials[0].control
        trials.append(Trial(scale, value, control, bool(enough)))
    sign = 1 if objective == "max" else -1
    best = max(
        (t for t in trials if t.admissible),
        key=lambda t: (sign * t.value, -abs(t.scale)),
    )
    return ScaleSearch(best.scale, best.value, tuple(trials))


def _evaluate(eval_fn, scale: float, constraint: float | None) -> tuple[float, Any]:
    result = eval_fn(scale)
    control = None
    if constraint is not None:
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(
                "scale_search: with a constraint eval_fn returns (value, control), "
                f"found {type(result).__name__}"
            )
        result, control = float(result[0]), float(result[1])
    value = float(result)
    for name, number in (("value", value), ("control", control)):
        if number is not None and math.isnan(number):
            raise ValueError(f"scale_search: {name} at scale {scale} is NaN")
    return value, control


def normalised_accuracy(accuracies: Any, finetuned: Any) -> float:
    """Mean over tasks of accuracy relative to the task's own fine-tuned model.

    (1 / T) sum_t accuracies[t] / finetuned[t]

    Args:
      accuracies: [T], of the merged model.
      finetuned: [T], of the single-task models; positive. For linearised models, those
        of the linearised fine-tunings.

    Returns:
      A float; 1.0 where merging costs nothing.

    Raises:
      ValueError: the shapes differ, a fine-tuned accuracy is not positive, or an
        accuracy is NaN or infinite.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 4.

    >>> normalised_accuracy([0.4, 0.9], [0.8, 0.9])
    0.75
    """
    have, best = np.asarray(accuracies, np.float64), np.asarray(finetuned, np.float64)
    if have.shape != best.shape or have.ndim != 1 or not have.size:
        raise ValueError(
            f"normalised_accuracy: accuracies are {have.shape}, finetuned "
            f"{best.shape}, wanted one of each per task"
        )
    if not np.all(best > 0):
        raise ValueError("normalised_accuracy: a fine-tuned accuracy is not positive")
    if not np.all(np.isfinite(have)):
        raise ValueError(f"normalised_accuracy: accuracies are {have.tolist()}")
    return float(np.mean(have / best))
