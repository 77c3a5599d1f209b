"""Learning coefficients of task vectors on the tasks of a zoo."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from mtl_jax.train import optim
from mtl_jax.transforms import merging
from mtl_jax.zoo.material import Material, Rows, stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How coefficients are learned.

    Attributes:
      steps: optimizer steps.
      batch_size: rows per task and step.
      optimizer: what `train.optim.over_steps` takes.
      seed: of the order of rows.
      chunk: steps of one compiled scan, after which progress is shown and the
        coefficients are recorded.
    """

    steps: int
    batch_size: int
    optimizer: Mapping[str, Any]
    seed: int
    chunk: int

    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return optim.over_steps(self.steps, dict(self.optimizer))

    def batches(
        self, rows: Sequence[Rows], batch_size: int | None = None
    ) -> Iterator[Rows]:
        """Stacks of batches from the rows of each task; see `stacks`."""
        return stacks(
            rows,
            steps=self.steps,
            batch_size=batch_size or self.batch_size,
            seed=self.seed,
            chunk=self.chunk,
        )


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
    recipe: Recipe,
    *,
    spread: Callable[[Any], Any] = lambda coeffs: coeffs,
) -> Callable[..., Trace]:
    """Makes a function that learns coefficients of task vectors; it compiles once.

    Args:
      material: the model, and where progress is shown.
      loss: `loss(logits, batch, task) -> scalar`; logits is a function of inputs,
        `logits(inputs) -> [B, C]`, with the head of the task; task is a slice of what
        is given as `tasks`.
      recipe: how.
      spread: `spread(coeffs) -> coeffs` before they are used, such as a clip.

    Returns:
      `run(taus, start, batches, tasks, parts=None) -> Trace`: taus with leaves [N, ...]
      and coefficients as `merging.compose` takes them; batches as `recipe.batches`
      makes them; tasks with leaves [T, ...], of which `head` is used here.
    """

    def merged(coeffs, args):
        return merging.compose(
            args["base"], args["taus"], spread(coeffs), parts=args["parts"]
        )

    def of_task(params, batch, task, args):
        def logits(inputs):
            return material.logits(params, inputs, task["head"], args["model"])

        return loss(logits, batch, task)

    learner = merging.learner(merged, of_task, recipe.tx())

    def run(taus, start, batches, tasks, parts=None) -> Trace:
        args = {
            "base": material.zoo.base,
            "taus": taus,
            "parts": parts,
            "model": material.args,
        }
        with material.progress.task("coefficients", total=recipe.steps) as bar:
            return learn(learner, start, batches, tasks, args, bar=bar)

    return run
