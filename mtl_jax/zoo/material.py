"""What a merge that learns may look at: the model as functions, rows, frozen heads."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.train import state as train_state
from mtl_jax.zoo import experts
from mtl_jax.zoo.evaluate import Evaluator

Rows = dict[str, np.ndarray]


class Material:
    """The tasks of a zoo, seen by a rule that learns how to merge.

    Everything is stacked over tasks, so that one compiled step serves all of them:
    heads have leaves [T, ...], batches [S, T, B, ...]. Inputs may come from any split,
    labels from training and validation rows alone, and only for a row that says so.

    Args:
      evaluator: knows the zoo.
      labels: whether labels may be had at all.
      linear: the model is the tangent one, expanded around the base.
    """

    def __init__(
        self, evaluator: Evaluator, *, labels: bool = False, linear: bool = False
    ):
        self.zoo = evaluator.zoo
        self.evaluator = evaluator
        self.progress = evaluator.progress
        self._labels = labels
        self._mode = "linear" if linear else "standard"
        self._logits = experts.logits_fn(
            self.zoo.encoder, self.zoo.settings, self._mode
        )
        self._predict = jax.jit(self.logits)

    @property
    def count(self) -> int:
        """Number of tasks."""
        return len(self.zoo.tasks)

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """Arrays that every call of the model takes, to be passed through `jit`."""
        origin = {"origin": self.zoo.base} if self._mode == "linear" else {}
        return {"frozen": self.zoo.frozen, **origin}

    def heads(self, tasks: Sequence[int] | None = None) -> dict[str, chex.Array]:
        """`prototypes` [T, C, D] and `active` [T, C] of some or all tasks."""
        found = [dict(self.zoo.tasks[task].head) for task in self._tasks(tasks)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def logits(self, trained: Any, inputs: Any, head: Any, args: Any) -> chex.Array:
        """[B, C] of one task; classes that it lacks are at -1e9.

        Args:
          trained: trained leaves, as in `zoo.base`.
          inputs: one batch; labels are ignored.
          head: one task's slice of `heads()`.
          args: `self.args`, so that they are no constants of a compiled step.
        """
        encoder = train_state.merge(trained, args["frozen"])
        rest = {"origin": args["origin"]} if "origin" in args else {}
        return self._logits({"encoder": encoder, "head": head, **rest}, inputs)

    def features(self, trained: Any, inputs: Any, args: Any) -> chex.Array:
        """[B, D] of the encoder, as the head gets them; not linearised."""
        whole = train_state.merge(trained, args["frozen"])
        return self.zoo.encoder.features(whole, inputs)

    def inputs(self, split: str, task: int) -> Rows:
        """The rows of a split, without their labels."""
        rows = self.zoo.tasks[task].splits[split]
        return {name: x for name, x in rows.items() if name != "label"}

    def labelled(
        self, split: str, task: int, *, per_class: int | None = None, seed: int = 0
    ) -> Rows:
        """Rows with labels, all of a split or the same number of every class.

        Args:
          split: "train" or "validation".
          task: index.
          per_class: k, drawn at random; classes with fewer rows give all they have.
          seed: of the draw.

        Raises:
          ValueError: the row did not say that it learns from labels, or test rows.
        """
        if not self._labels:
            raise ValueError("labelled: the row has labels=False")
        if split == "test":
            raise ValueError("labelled: test rows keep their labels")
        rows = dict(self.zoo.tasks[task].splits[split])
        if per_class is None:
            return rows
        if per_class < 1:
            raise ValueError(f"labelled: per_class wants 1 or more, found {per_class}")
        order = np.random.default_rng((seed, task)).permutation(len(rows["label"]))
        labels = rows["label"][order]
        rank = np.zeros(len(order), int)
        for label in np.unique(labels):
            rank[labels == label] = np.arange(np.sum(labels == label))
        keep = np.sort(order[rank < per_class])
        return {name: x[keep] for name, x in rows.items()}

    def batches(
        self,
        split: str,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        tasks: Sequence[int] | None = None,
        labels: bool = False,
        chunk: int | None = None,
    ) -> Iterator[Rows]:
        """Batches of every task, drawn epoch by epoch, in stacks for `lax.scan`.

        Args:
          split: whose rows.
          steps: how many in all.
          batch_size: B, rows per task; a task with fewer repeats them.
          seed: of the order.
          tasks: which; all by default.
          labels: with labels, see `labelled`.
          chunk: S, steps of one stack (the last may have fewer); all by default.

        Yields:
          Leaves [S, T, B, ...].
        """
        tasks = self._tasks(tasks)
        read = self.labelled if labels else self.inputs
        rows = [read(split, task) for task in tasks]
        yield from stacks(
            rows, steps=steps, batch_size=batch_size, seed=seed, chunk=chunk
        )

    def outputs(self, trained: Any, task: int, inputs: Any) -> chex.Array:
        """Logits [N, C] for any rows of a task, of the classes that it has; compiled.

        One compiled function serves all tasks, for rows of one shape.
        """
        data = self.zoo.tasks[task]
        found = self._predict(trained, inputs, data.head, self.args)
        return found[:, : data.num_classes]

    def probabilities(self, trained: Any, task: int, inputs: Any) -> np.ndarray:
        """[N, C] for any rows of a task, of the classes that it has."""
        return np.asarray(jax.nn.softmax(self.outputs(trained, task, inputs)))

    def predict(self, trained: Any, task: int, inputs: Any) -> np.ndarray:
        """Predicted classes [N] of any rows of a task."""
        return self.probabilities(trained, task, inputs).argmax(-1)

    def _tasks(self, tasks: Sequence[int] | None) -> list[int]:
        return list(range(self.count) if tasks is None else tasks)


def stacks(
    rows: Sequence[Rows],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    chunk: int | None = None,
) -> Iterator[Rows]:
    """Draws batches of every task's rows without replacement, epoch after epoch.

    Args:
      rows: one dict of arrays [N_t, ...] per task; texts of different lengths are
        padded with zeros, which their masks leave out.
      steps: how many batches in all.
      batch_size: B.
      seed: of the order; each task has its own.
      chunk: S, steps of one stack; all by default.

    Yields:
      Leaves [S, T, B, ...].

    Raises:
      ValueError: no rows, or rows that do not stack.
    """
    if steps < 1 or batch_size < 1 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"batches: wants steps={steps}, batch_size={batch_size} and chunk={chunk} "
            "of at least 1"
        )
    order = []
    for task, found in enumerate(rows):
        total = len(next(iter(found.values())))
        if not total:
            raise ValueError(f"batches: task {task} has no rows")
        draw = np.random.default_rng((seed, task))
        epochs = -(-steps * batch_size // total)
        index = np.concatenate([draw.permutation(total) for _ in range(epochs)])
        order.append(index[: steps * batch_size].reshape(steps, batch_size))
    chunk = chunk or steps
    for start in range(0, steps, chunk):
        yield {
            name: np.stack(
                _padded(
                    name,
                    [
                        r[name][o[start : start + chunk]]
                        for r, o in zip(rows, order, strict=True)
                    ],
                ),
                axis=1,
            )
            for name in rows[0]
        }


def _padded(name: str, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays [S, B, ...] of one shape; token rows are filled up with zeros."""
    shapes = {part.shape[2:] for part in parts}
    if len(shapes) == 1:
        return parts
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"batches: {name!r} has rows of {sorted(shapes)}")
    width = max(shape[0] for shape in shapes)
    return [
        np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[2]))) for part in parts
    ]
