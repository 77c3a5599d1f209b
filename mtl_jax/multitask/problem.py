"""A multi-task problem: tasks, rows, and the model whose losses every method weighs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from mtl_jax import io, losses, models, train

Rows = Mapping[str, np.ndarray]
_EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What one task predicts.

    Attributes:
      name: column of the rows that holds its label.
      kind: "classification" (labels are class numbers, the metric is accuracy),
        "binary" (0 or 1, accuracy) or "regression" (numbers, root mean square error).
      size: width of the model's output.
    """

    name: str
    kind: str
    size: int

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(
                f"Target {self.name!r}: kind wants one of {', '.join(_KINDS)}, "
                f"found {self.kind!r}"
            )

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return "rmse" if self.kind == "regression" else "accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric improves."""
        return self.kind != "regression"


_KINDS = ("classification", "binary", "regression")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Tasks on data, and the model that all methods train.

    Attributes:
      name: of the data.
      targets: the T tasks, in order.
      inputs: columns that the model reads, in the order of its arguments.
      splits: "train", "validation", "test" -> columns [N, ...]. With a column `task`
        [N] each row belongs to one task, its label is in the column `label`, and the
        loss of a task is the mean over its own rows of a batch: 0 where it has none.
      model: a `models.multitask.MultiTaskModule` whose outputs are the targets.
      about: plain data that tell the model from every other; part of the address of
        what is measured on the problem.
    """

    name: str
    targets: tuple[Target, ...]
    inputs: tuple[str, ...]
    splits: Mapping[str, Rows]
    model: models.multitask.MultiTaskModule
    about: Mapping[str, Any]

    def __post_init__(self):
        if not self.targets:
            raise ValueError(f"Problem {self.name!r}: wants at least one target")
        wanted = {target.name: target.size for target in self.targets}
        if dict(self.model.outputs) != wanted:
            raise ValueError(
                f"Problem {self.name!r}: the targets are {wanted}, the model's outputs "
                f"are {dict(self.model.outputs)}"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """T names."""
        return tuple(target.name for target in self.targets)

    @property
    def own_rows(self) -> bool:
        """Whether each row belongs to one task."""
        return "task" in self.splits["train"]

    def digest(self) -> str:
        """Content hash of rows, tasks and model."""
        targets = [dataclasses.asdict(target) for target in self.targets]
        about = [self.name, targets, self.inputs, dict(self.about)]
        text = json.dumps(about, sort_keys=True).encode()
        return io.digest(
            {"rows": dict(self.splits), "about": np.frombuffer(text, np.uint8)}
        )

    def init(self, key: chex.PRNGKey) -> chex.ArrayTree:
        """Parameters."""
        rows = self.splits["train"]
        example = [jnp.asarray(rows[name][:1]) for name in self.inputs]
        return self.model.init(key, *example)["params"]

    def encode(self, params: chex.ArrayTree, batch: Rows, key: Any = None) -> Any:
        """The shared representation of a batch."""
        columns = [batch[name] for name in self.inputs]
        return self._apply(params, *columns, key=key, method="encode")

    def decode(self, params: chex.ArrayTree, z: Any) -> dict[str, chex.Array]:
        """Outputs of all tasks, {name: [B, size]} float32, from a representation."""
        return self._apply(params, z, method="decode")

    def outputs(self, params: chex.ArrayTree, batch: Rows, key: Any = None) -> Any:
        """Outputs of all tasks on all rows."""
        return self.decode(params, self.encode(params, batch, key))

    def task_losses(self, outputs: Any, batch: Rows) -> chex.Array:
        """Mean loss of each task over its rows, [T] float32."""
        return jnp.stack(
            [
                _masked_mean(_loss(target, outputs[target.name], label), mask)
                for target, label, mask in self._labels(batch)
            ]
        )

    def loss_fn(
        self, params: chex.ArrayTree, batch: Rows, key: chex.PRNGKey
    ) -> tuple[chex.Array, dict[str, chex.Array]]:
        """`(losses [T], metrics)`, as `train.Trainable` takes it with an aggregator."""
        return self.task_losses(self.outputs(params, batch, key), batch), {}

    def evaluate(self, params: chex.ArrayTree, split: str) -> dict[str, float]:
        """The metric of every task on a split."""
        rows = self.splits[split]
        count = len(rows[self.inputs[0]])
        batches = [
            {name: x[i : i + _EVALUATION_BATCH] for name, x in rows.items()}
            for i in range(0, count, _EVALUATION_BATCH)
        ]
        found = train.evaluate(self._score, batches, params=params)
        return {
            t.name: _metric(t, found[t.name], found[f"rows of {t.name}"])
            for t in self.targets
        }

    def _score(self, params: chex.ArrayTree, batch: Rows) -> dict[str, chex.Array]:
        """Per example: what the metric averages, and whether the row counts."""
        outputs = self.outputs(params, batch)
        found = {}
        for target, label, mask in self._labels(batch):
            value = _value(target, outputs[target.name], label)
            found[target.name] = jnp.where(mask, value, 0)
            found[f"rows of {target.name}"] = mask.astype(jnp.float32)
        return found

    def _labels(self, batch: Rows):
        """(target, label [B], mask [B]) of every task."""
        for number, target in enumerate(self.targets):
            if "task" in batch:
                mask = batch["task"] == number
                label = jnp.where(mask, batch["label"], 0)
            else:
                label = jnp.asarray(batch[target.name])
                mask = jnp.ones(label.shape, bool)
            yield target, label, mask

    def _apply(self, params: Any, *args: Any, key: Any = None, method: str) -> Any:
        rngs = None if key is None else {"dropout": key, "gumbel": key}
        return self.model.apply({"params": params}, *args, rngs=rngs, method=method)


def _loss(target: Target, output: chex.Array, label: chex.Array) -> chex.Array:
    """[B] float32."""
    if target.kind == "classification":
        return losses.softmax_cross_entropy(output, label)
    label = label.astype(jnp.float32)
    if target.kind == "binary":
        return losses.sigmoid_cross_entropy(output[:, 0], label)
    return losses.squared_error(output[:, 0], label)


def _value(target: Target, output: chex.Array, label: chex.Array) -> chex.Array:
    """[B] float32, what the metric is the mean of."""
    if target.kind == "regression":
        return jnp.square(output[:, 0] - label.astype(jnp.float32))
    if target.kind == "binary":
        right = (output[:, 0] > 0) == (label > 0)
    else:
        right = jnp.argmax(output, -1) == label
    return right.astype(jnp.float32)


def _metric(target: Target, total: float, share: float) -> float:
    if not share:
        raise ValueError(f"evaluate: no row belongs to the task {target.name!r}")
    mean = total / share
    return float(np.sqrt(mean)) if target.kind == "regression" else mean


def _masked_mean(values: chex.Array, mask: chex.Array) -> chex.Array:
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1)
    return jnp.sum(jnp.where(mask, values, 0)) / count


def take(problem: Problem, names: Sequence[str]) -> Problem:
    """The problem with some of its tasks only.

    Args:
      problem: the whole.
      names: tasks that are kept, in their order.

    Raises:
      ValueError: a name that does not exist.
    """
    unknown = [name for name in names if name not in problem.task_names]
    if unknown or not names:
        raise ValueError(
            f"take: wanted some of {', '.join(problem.task_names)}, found {list(names)}"
        )
    kept = [t for t in problem.targets if t.name in names]
    outputs = {t.name: t.size for t in kept}
    model = problem.model.clone(outputs=outputs)
    splits = problem.splits
    if problem.own_rows:
        splits = {split: _own(rows, problem, kept) for split, rows in splits.items()}
    return dataclasses.replace(problem, targets=tuple(kept), model=model, splits=splits)


def _own(rows: Rows, problem: Problem, kept: list[Target]) -> Rows:
    """Rows of the kept tasks, renumbered."""
    new = np.full(len(problem.targets), -1)
    for number, target in enumerate(kept):
        new[problem.targets.index(target)] = number
    task = new[rows["task"]].astype(rows["task"].dtype)
    chosen = {name: x[task >= 0] for name, x in rows.items()}
    return {**chosen, "task": task[task >= 0]}
