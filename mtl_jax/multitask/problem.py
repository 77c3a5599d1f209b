"""A multi-task problem: tasks, rows, and the model whose losses every method weighs."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mtl_jax import io, losses, metrics, models
from mtl_jax.data.multitask import Target
from mtl_jax.models.layers.sharding import Rules

Rows = Mapping[str, np.ndarray]
_EVALUATION_BATCH = 256
METRICS = ("accuracy", "auc", "mse", "rmse")


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
      model: a `models.multitask.MultiTaskModule` whose outputs are the targets. What it
        sows in the collection "losses" is a penalty, see `loss_fn`.
      about: plain data that tell the model from every other; part of the address of
        what is measured on the problem.
      rules: sharding rules of the parameters, see `train.Trainable`.
      frozen: regexes on leaf paths that no method trains.
      loaded: `loaded(params) -> params` puts pretrained weights into fresh ones.
    """

    name: str
    targets: tuple[Target, ...]
    inputs: tuple[str, ...]
    splits: Mapping[str, Rows]
    model: models.multitask.MultiTaskModule
    about: Mapping[str, Any]
    rules: Rules = ((".*", PartitionSpec()),)
    frozen: tuple[str, ...] = ()
    loaded: Callable[[chex.ArrayTree], chex.ArrayTree] | None = None

    def __post_init__(self):
        if not self.targets:
            raise ValueError(f"Problem {self.name!r}: wants at least one target")
        for target in self.targets:
            if target.metric not in METRICS or target.dense:
                raise ValueError(
                    f"Problem {self.name!r}: the metric of {target.name!r} is "
                    f"{target.metric!r}{' per pixel' if target.dense else ''}, known "
                    f"per row: {', '.join(METRICS)}"
                )
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
        targets = [target._asdict() for target in self.targets]
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

    def start(self, seed: int) -> chex.ArrayTree | None:
        """Pretrained parameters with fresh heads; None where all are fresh."""
        if self.loaded is None:
            return None
        return self.loaded(jax.jit(self.init)(jax.random.key(seed)))

    def encode(self, params: chex.ArrayTree, batch: Rows, key: Any = None) -> Any:
        """The shared representation of a batch."""
        columns = [batch[name] for name in self.inputs]
        return self._apply(params, *columns, key=key, method="encode")

    def encode_with_penalty(
        self, params: chex.ArrayTree, batch: Rows, key: Any = None
    ) -> tuple[Any, chex.Array | None]:
        """The same, and the sum of what the model sows in the collection "losses".

        Returns:
          `(z, penalty)`, a float32 scalar; None where nothing is sown.
        """
        columns = [batch[name] for name in self.inputs]
        z, state = self._apply(
            params, *columns, key=key, method="encode", mutable=["losses"]
        )
        sown = [jnp.sum(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(state)]
        return z, sum(sown[1:], sown[0]) if sown else None

    @functools.cached_property
    def has_penalty(self) -> bool:
        """Whether the model sows one; computes nothing."""
        rows = {name: x[:1] for name, x in self.splits["train"].items()}

        def penalty(key):
            return self.encode_with_penalty(self.init(key), rows, key)[1]

        return jax.eval_shape(penalty, jax.random.key(0)) is not None

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
        """`(losses [T], metrics)`, as `train.Trainable` takes it with an aggregator.

        A penalty that the model sows, such as that of `DSelectK`, is split evenly over
        the tasks. So the sum of the losses holds it once, and leaves outside the shared
        ones, such as gates, get exactly its gradient whatever the aggregator; what is
        shared, and methods that look at the losses, see each task with its part.
        The metric `penalty` tells it apart. Evaluation has none of it.
        """
        z, penalty = self.encode_with_penalty(params, batch, key)
        found = self.task_losses(self.decode(params, z), batch)
        if penalty is None:
            return found, {}
        return found + penalty / len(self.targets), {"penalty": penalty}

    def task_counts(self, batch: Rows) -> chex.Array:
        """How many rows of a batch each task has, [T] float32."""
        return jnp.stack(
            [jnp.sum(mask.astype(jnp.float32)) for _, _, mask in self._labels(batch)]
        )

    def evaluate(self, params: chex.ArrayTree, split: str) -> dict[str, float]:
        """The metric of every task on its rows of a split.

        Raises:
          ValueError: a task has no row there, an output is not finite, or an AUC has
            one class only.
        """
        rows = self.splits[split]
        outputs = self._predict(params, rows)
        found = {}
        for target, label, mask in self._labels(rows):
            mask, name = np.asarray(mask), target.name
            if not mask.any():
                raise ValueError(f"evaluate: no {split} row belongs to {name!r}")
            values = outputs[name][mask]
            if not np.isfinite(values).all():
                raise ValueError(f"evaluate: outputs of {name!r} are not finite")
            found[name] = _metric(target, values, np.asarray(label)[mask])
        return found

    def _predict(self, params: chex.ArrayTree, rows: Rows) -> dict[str, np.ndarray]:
        """Outputs on all rows, batch by batch; the first row fills up the last one."""
        count = len(rows[self.inputs[0]])
        index = np.arange(-(-count // _EVALUATION_BATCH) * _EVALUATION_BATCH)
        index = np.where(index < count, index, 0).reshape(-1, _EVALUATION_BATCH)
        parts = [
            self._outputs(params, {name: rows[name][i] for name in self.inputs})
            for i in index
        ]
        return {
            name: np.concatenate([np.asarray(part[name]) for part in parts])[:count]
            for name in self.task_names
        }

    @functools.cached_property
    def _outputs(self) -> Any:
        return jax.jit(self.outputs)

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

    def _apply(self, params: Any, *args: Any, key: Any = None, **options: Any) -> Any:
        rngs = None if key is None else {"dropout": key, "branch": key}
        return self.model.apply({"params": params}, *args, rngs=rngs, **options)


def _loss(target: Target, output: chex.Array, label: chex.Array) -> chex.Array:
    """[B] float32."""
    if target.kind == "classification":
        return losses.softmax_cross_entropy(output, label)
    label = label.astype(jnp.float32)
    if target.kind == "binary":
        return losses.sigmoid_cross_entropy(output[:, 0], label)
    return losses.squared_error(output[:, 0], label)


def _metric(target: Target, output: np.ndarray, label: np.ndarray) -> float:
    if target.kind == "regression":
        mean = float(np.mean(np.square(output - label.reshape(output.shape))))
        return float(np.sqrt(mean)) if target.metric == "rmse" else mean
    if target.metric == "auc":
        return float(metrics.roc_auc(output[:, 0], label))
    if target.kind == "binary":
        return float(np.mean((output[:, 0] > 0) == (label > 0)))
    return float(np.mean(np.argmax(output, -1) == label))


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
