"""Learning coefficients of task vectors on the tasks of a zoo."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import optax

from mtl_jax.transforms import merging
from mtl_jax.zoo.material import Material


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """How learning went.

    Attributes:
      variables: what was learned.
      losses: [S, T] float32, by step and task.
      path: (steps done, variables) after every stack of batches.
    """

    variables: Any
    losses: np.ndarray
    path: tuple[tuple[int, Any], ...]


def learn(
    run: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    tasks: Any,
    args: Any,
    bar: Any,
) -> Trace:
    """Feeds stacks of batches to a `merging.learner`, one compiled scan for each.

    Args:
      run: what `merging.learner` made.
      variables: where it starts.
      batches: stacks with leaves [S, T, ...].
      tasks: leaves [T, ...], such as heads.
      args: arrays for the functions of the learner.
      bar: a task of `report.Progress`.

    Raises:
      ValueError: a loss that is not finite.
    """
    state, losses, path = None, [], []
    for stack in batches:
        found = run(variables, stack, tasks, args, state)
        variables, state = found.variables, found.state
        losses.append(np.asarray(found.losses))
        if not np.isfinite(losses[-1]).all():
            raise ValueError(f"learn: a loss is not finite after {bar.step} steps")
        path.append((bar.step + len(losses[-1]), variables))
        bar.advance(len(losses[-1]), loss=float(losses[-1].sum(1).mean()))
    return Trace(variables=variables, losses=np.concatenate(losses), path=tuple(path))


def coefficients(
    material: Material,
    loss: Callable[[Any, Any, Any], Any],
    tx: optax.GradientTransformation,
    *,
    spread: Callable[[Any], Any] = lambda coeffs: coeffs,
) -> Callable[..., Trace]:
    """Makes a function that learns coefficients of task vectors; it compiles once.

    Args:
      material: the model, and where progress is shown.
      loss: `loss(logits, batch, task) -> scalar`; logits is a function of inputs,
        `logits(inputs) -> [B, C]`, with the head of the task; task is a slice of what
        is given as `tasks`.
      tx: of the coefficients.
      spread: `spread(coeffs) -> coeffs` before they are used, such as a clip.

    Returns:
      `run(taus, start, batches, tasks, steps, parts=None) -> Trace`: taus with leaves
      [N, ...] and coefficients as `merging.compose` takes them; batches stacks with
      leaves [S, T, B, ...]; tasks with leaves [T, ...], of which `head` is used here.
    """

    def merged(coeffs, args):
        return merging.compose(
            args["base"], args["taus"], spread(coeffs), parts=args["parts"]
        )

    def of_task(params, batch, task, args):
        def logits(inputs):
            return material.logits(params, inputs, task["head"], args["model"])

        return loss(logits, batch, task)

    learner = merging.learner(merged, of_task, tx)

    def run(taus, start, batches, tasks, steps, parts=None) -> Trace:
        args = {
            "base": material.zoo.base,
            "taus": taus,
            "parts": parts,
            "model": material.args,
        }
        with material.progress.task("coefficients", total=steps) as bar:
            return learn(learner, start, batches, tasks, args, bar=bar)

    return run
