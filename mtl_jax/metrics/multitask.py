"""Multi-task results against single-task baselines, and how tasks conflict.

On the host, in NumPy float64: for tables, not for training steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Scores = Mapping[str, Mapping[str, Any]]


class DeltaP(NamedTuple):
    """Relative improvements over the baselines in percent; positive is better.

    Attributes:
      task: mean over tasks of the mean over the task's metrics.
      metric: mean over all metrics of all tasks alike.
      by_task: task name -> mean over its metrics.
      by_metric: task name -> metric name -> improvement.
    """

    task: Any
    metric: Any
    by_task: dict[str, Any]
    by_metric: dict[str, dict[str, Any]]


def delta_p(scores: Scores, baselines: Scores, higher_is_better: Scores) -> DeltaP:
    r"""Relative improvement over single-task models, in percent.

      100 (-1)^l (M - B) / |B|,   l = 1 where a lower M is better

    Args:
      scores: task name -> metric name -> M; a number, or an array of them such as one
        per seed, all of one shape.
      baselines: the same of the single-task models, B; not 0.
      higher_is_better: the same, of bools.

    Returns:
      A `DeltaP` of floats, or of arrays where the scores are arrays.

    Raises:
      ValueError: tasks or metrics that are not those of `scores`, a baseline of 0, or a
        score that is not finite, by name.

    **Follows**: Wang et al. 2025, "Rep-MTL", both averages; Maninis et al. 2019,
      "Attentive Single-Tasking of Multiple Tasks", for the sign.
    **Differs**: papers on gradient surgery since CAGrad print the negative.

    >>> found = delta_p(
    ...     {"depth": {"error": 0.5}, "segmentation": {"miou": 60.0, "accuracy": 80.0}},
    ...     {"depth": {"error": 1.0}, "segmentation": {"miou": 50.0, "accuracy": 80.0}},
    ...     {
    ...         "depth": {"error": False},
    ...         "segmentation": {"miou": True, "accuracy": True},
    ...     },
    ... )
    >>> found.task, round(found.metric, 3), found.by_task
    (30.0, 23.333, {'depth': 50.0, 'segmentation': 10.0})
    """
    for other, name in (
        (baselines, "baselines"),
        (higher_is_better, "higher_is_better"),
    ):
        _same_names(scores, other, name)
    if not scores or not all(scores.values()):
        raise ValueError("delta_p: no scores, wanted a metric for every task")
    by_metric = {
        task: {
            metric: _improvement(
                f"{task}/{metric}",
                score,
                baselines[task][metric],
                higher_is_better[task][metric],
            )
            for metric, score in metrics.items()
        }
        for task, metrics in scores.items()
    }
    by_task = {task: _mean(list(x.values())) for task, x in by_metric.items()}
    every = [x for metrics in by_metric.values() for x in metrics.values()]
    return DeltaP(_mean(list(by_task.values())), _mean(every), by_task, by_metric)


def delta_m(scores: Scores, baselines: Scores, higher_is_better: Scores) -> Any:
    """Mean over tasks of the relative improvement over single-task models, in percent.

    Args:
      scores: as for `delta_p`.
      baselines: as for `delta_p`.
      higher_is_better: as for `delta_p`.

    Returns:
      `delta_p(...).task`; positive is better.

    Raises:
      ValueError: as `delta_p`.

    >>> delta_m({"a": {"loss": 0.5}}, {"a": {"loss": 1.0}}, {"a": {"loss": False}})
    50.0
    """
    return delta_p(scores, baselines, higher_is_better).task


class Conflicts(NamedTuple):
    """How often task gradients disagree over a run.

    Attributes:
      cosines: [T, T] float64, mean cosines of the pairs; NaN where a pair never had two
        gradients.
      rates: [T, T] float64, share of steps in which a pair's inner product is negative;
        0 on the diagonal.
      pairs: share of all pairs in all steps that conflict.
      steps: share of the steps in which any pair conflicts.
    """

    cosines: np.ndarray
    rates: np.ndarray
    pairs: float
    steps: float


def cosine_matrix(gram: Any) -> np.ndarray:
    """Cosines between task gradients.

    Args:
      gram: [..., T, T], inner products of task gradients.

    Returns:
      [..., T, T] float64; NaN in the rows and columns of a zero gradient.

    Raises:
      ValueError: not square.

    >>> cosine_matrix([[4.0, -1.0], [-1.0, 1.0]]).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    gram = _grams("cosine_matrix", gram)
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale = norms[..., :, None] * norms[..., None, :]
    some = scale > 0
    return np.where(some, gram / np.where(some, scale, 1), np.nan)


def conflicts(grams: Any) -> Conflicts:
    """Sums up the Gramians of a run.

    Args:
      grams: [N, T, T] of N steps, or [T, T] of one.

    Returns:
      A `Conflicts`. A zero gradient conflicts with nothing.

    Raises:
      ValueError: not square, no steps, or entries that are not finite.

    >>> found = conflicts([[[1.0, -1.0], [-1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    >>> found.pairs, found.steps, found.cosines[0].tolist()
    (0.5, 0.5, [1.0, 0.0])
    """
    grams = _grams("conflicts", grams)
    grams = grams.reshape(-1, *grams.shape[-2:])
    if not len(grams):
        raise ValueError("conflicts: no steps, wanted one Gramian or more")
    cosines = cosine_matrix(grams)
    known = ~np.isnan(cosines)
    counts = known.sum(0)
    means = np.where(known, cosines, 0).sum(0) / np.maximum(counts, 1)
    negative = grams < 0
    first, second = np.triu_indices(grams.shape[-1], 1)
    pairs = negative[:, first, second]
    return Conflicts(
        cosines=np.where(counts > 0, means, np.nan),
        rates=negative.mean(0),
        pairs=float(pairs.mean()) if pairs.size else 0.0,
        steps=float(pairs.any(1).mean()),
    )


def _grams(name: str, gram: Any) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise ValueError(f"{name}: the Gramian is {gram.shape}, wanted [..., T, T]")
    if not np.isfinite(gram).all():
        raise ValueError(f"{name}: the Gramian holds NaN or infinity")
    return gram


def _same_names(scores: Scores, other: Scores, name: str) -> None:
    def names(x):
        return {(task, metric) for task, metrics in x.items() for metric in metrics}

    for task, metric in sorted(names(scores) ^ names(other)):
        has = "scores" if (task, metric) in names(scores) else name
        lacks = name if has == "scores" else "scores"
        raise ValueError(f"delta_p: '{task}/{metric}' is in {has} but not in {lacks}")


def _improvement(name: str, score: Any, baseline: Any, higher: Any) -> Any:
    score = np.asarray(score, np.float64)
    baseline = np.asarray(baseline, np.float64)
    for what, x in (("score", score), ("baseline", baseline)):
        if not np.isfinite(x).all():
            raise ValueError(f"delta_p: the {what} of {name!r} is not finite")
    if (baseline == 0).any():
        raise ValueError(
            f"delta_p: the baseline of {name!r} is 0, nothing is relative to it"
        )
    change = 100 * (score - baseline) / np.abs(baseline)
    return _plain(change if higher else -change)


def _mean(values: list) -> Any:
    return _plain(np.mean(np.stack(np.broadcast_arrays(*values)), 0))


def _plain(x: Any) -> Any:
    """A float where there is one number."""
    return float(x) if np.ndim(x) == 0 else np.asarray(x)
