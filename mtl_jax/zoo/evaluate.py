"""Accuracy of edited models on the tasks of a zoo, remembered by content."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import io
from mtl_jax.models import heads
from mtl_jax.train import state as train_state
from mtl_jax.transforms import linearize
from mtl_jax.zoo import experts
from mtl_jax.zoo.experts import Zoo

_BATCH = 64


class Evaluator:
    """Measures parameters on tasks; the same question is computed once.

    An answer depends on parameters, rows and mode only, so it is filed under their
    content hashes beside the experts; a study that is repeated, resumed or extended
    computes what is new. `remember=False` computes everything again.

    Args:
      zoo: where tasks, frozen leaves and heads come from.
      remember: read and write the file of answers.
      progress: a `report.Progress`.
    """

    def __init__(self, zoo: Zoo, *, remember: bool = True, progress: Any):
        self.zoo = zoo
        self.progress = progress
        self.computed = 0
        self._predict = {
            mode: jax.jit(_classes(experts.logits_fn(zoo.encoder, zoo.settings, mode)))
            for mode in experts.MODES
        }
        self._sweep = jax.jit(self._predict_sweep)
        self._path = zoo.folder / "evaluations.jsonl" if remember else None
        self._known = self._read()
        self._batches: dict[tuple[int, str], list[Any]] = {}

    def params(self, trained: Any, task: int, *, linear: bool = False) -> Any:
        """The whole tree that the logits function takes."""
        origin = {"origin": self.zoo.base} if linear else {}
        return {
            "encoder": self.whole(trained),
            "head": self.zoo.tasks[task].head,
            **origin,
        }

    def whole(self, trained: Any) -> Any:
        """All leaves of the encoder, from its trained ones."""
        return train_state.merge(trained, self.zoo.frozen)

    def logits_of(self, task: int, linear: bool = False) -> Any:
        """`logits(trained, batch) -> [B, C]` with the head of one task."""
        mode = "linear" if linear else "standard"
        logits = experts.logits_fn(self.zoo.encoder, self.zoo.settings, mode)
        return lambda trained, batch: logits(
            self.params(trained, task, linear=linear), batch
        )

    def predict(
        self, trained: Any, task: int, split: str, *, linear: bool = False
    ) -> np.ndarray:
        """Predicted classes [N] of the rows of a split.

        Raises:
          ValueError: the model's logits are not finite.
        """
        params = self.params(trained, task, linear=linear)
        predict = self._predict["linear" if linear else "standard"]
        found = [predict(params, batch) for batch in self.batches(task, split)]
        return self._collect("predict", found, task, split)

    def _collect(self, name: str, found: Any, task: int, split: str) -> np.ndarray:
        """Joins (classes [..., B], finite) of padded batches; [..., N]."""
        data = self.zoo.tasks[task]
        if not all(bool(finite) for _, finite in found):
            raise ValueError(
                f"{name}: the model's logits are not finite on the {split} rows of "
                f"{data.name!r}"
            )
        rows = len(data.splits[split]["label"])
        joined = np.concatenate([np.asarray(x) for x, _ in found], axis=-1)
        return joined[..., :rows]

    def accuracy(
        self,
        trained: Any,
        task: int,
        split: str,
        *,
        linear: bool = False,
        digest: str | None = None,
    ) -> float:
        """Fraction of rows of `split` that are classified right.

        Args:
          trained: trained leaves, as in `zoo.base`.
          task: index of the task.
          split: "validation" or "test".
          linear: evaluate in the tangent space of the base.
          digest: content hash of `trained`, where the caller has it already.
        """
        data = self.zoo.tasks[task]
        labels = data.splits[split]["label"]
        key = ":".join(
            (
                self.zoo.identity,
                digest or io.digest(trained),
                "linear" if linear else "standard",
                data.digests[split],
            )
        )
        if key not in self._known:
            predicted = self.predict(trained, task, split, linear=linear)
            self._known[key] = float(np.mean(predicted == labels))
            self.computed += 1
            self._append(key)
        return self._known[key]

    def tangent_accuracies(
        self, delta: Any, scales: Sequence[float], task: int, split: str
    ) -> list[float]:
        """Tangent-space accuracy at `base + scale * delta`; one JVP for all scales."""
        data = self.zoo.tasks[task]
        where = f"{self.zoo.identity}:{io.digest(delta)}"
        keys = [f"{where}*{scale!r}:sweep:{data.digests[split]}" for scale in scales]
        if any(key not in self._known for key in keys):
            wide = jnp.asarray(scales, jnp.float32)
            found = [
                self._sweep(delta, wide, data.head, batch)
                for batch in self.batches(task, split)
            ]
            labels = data.splits[split]["label"]
            predicted = self._collect("tangent_accuracies", found, task, split)
            self.computed += 1
            for key, row in zip(keys, predicted, strict=True):
                self._known[key] = float(np.mean(row == labels))
                self._append(key)
        return [self._known[key] for key in keys]

    def accuracies_of(self, features: Any, params: Any, split: str) -> list[float]:
        """Accuracy of a model with features of its own, on every task; not remembered.

        Args:
          features: `features(params, inputs, task) -> [B, D]`, `task` a traced int32.
          params: what it takes.
          split: "validation" or "test".
        """
        settings = self.zoo.settings

        def logits(params, batch):
            found = features(params["own"], batch, params["task"])
            return experts.head_logits(found, params["head"], settings)

        predict, accuracies = jax.jit(_classes(logits)), []
        for task, data in enumerate(self.zoo.tasks):
            known = {"own": params, "head": data.head, "task": jnp.int32(task)}
            found = [predict(known, batch) for batch in self.batches(task, split)]
            classes = self._collect("accuracies_of", found, task, split)
            accuracies.append(float(np.mean(classes == data.splits[split]["label"])))
        self.computed += 1
        return accuracies

    def accuracies(self, trained: Any, split: str, *, linear: bool = False) -> list:
        """Accuracy on every task, in order."""
        digest = io.digest(trained)
        return [
            self.accuracy(trained, task, split, linear=linear, digest=digest)
            for task in range(len(self.zoo.tasks))
        ]

    def batches(self, task: int, split: str) -> list[Any]:
        """The rows in batches of one size; the split's first row fills up the last."""
        if (task, split) not in self._batches:
            rows = self.zoo.tasks[task].splits[split]
            count = len(rows["label"])
            index = np.arange(-(-count // _BATCH) * _BATCH)
            index = np.where(index < count, index, 0).reshape(-1, _BATCH)
            self._batches[task, split] = [
                {name: jnp.asarray(x[part]) for name, x in rows.items()}
                for part in index
            ]
        return self._batches[task, split]

    def rows(self, task: int, split: str, limit: int | None = None) -> list[Any]:
        """Each row once, in batches of which the last may be smaller."""
        rows = self.zoo.tasks[task].splits[split]
        count = min(len(rows["label"]), limit or len(rows["label"]))
        return [
            {
                name: jnp.asarray(x[i : min(i + _BATCH, count)])
                for name, x in rows.items()
            }
            for i in range(0, count, _BATCH)
        ]

    def _predict_sweep(self, delta, scales, head, batch):
        """Predicted classes [A, B] in the tangent space of the base."""
        encoder = self.zoo.encoder

        def features(trained, batch):
            return encoder.features(self.whole(trained), batch)

        sweep = linearize.scale_sweep(features, self.zoo.base, delta, scales)
        logits = jax.vmap(heads.prototype_logits, (0, None))(
            sweep(batch), head["prototypes"]
        )
        masked = jnp.where(head["active"], logits, -jnp.inf)
        return jnp.argmax(masked, -1), jnp.all(jnp.isfinite(logits))

    def _read(self) -> dict[str, float]:
        if self._path is None or not self._path.exists():
            return {}
        known = {}
        # What is cut short or damaged is computed again.
        for line in self._path.read_bytes().splitlines():
            try:
                answers = json.loads(line)
            except ValueError:
                continue
            if isinstance(answers, dict):
                known |= {k: v for k, v in answers.items() if _is_accuracy(v)}
        return known

    def _append(self, key: str) -> None:
        if self._path is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: self._known[key]}) + "\n")


def _classes(logits: Any) -> Any:
    """(predicted classes [B], whether all logits are finite)."""

    def classes(params, batch):
        found = logits(params, batch)
        return jnp.argmax(found, -1), jnp.all(jnp.isfinite(found))

    return classes


def _is_accuracy(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1
