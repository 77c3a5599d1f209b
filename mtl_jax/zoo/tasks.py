"""Tasks as arrays with frozen heads: what experts are trained and measured on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from mtl_jax import data, io
from mtl_jax.zoo.encoders import Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's rows and its frozen head.

    Attributes:
      name: the task's name.
      num_classes: C.
      splits: "train", "validation", "test" -> dict of stacked NumPy arrays.
      head: `prototypes` [C_max, D] float32 unit rows and `active` [C_max] bool;
        padded to the widest task, so that one compiled step serves every task.
      digests: content hash of each split together with the identity of the head.
    """

    name: str
    num_classes: int
    splits: Mapping[str, Mapping[str, np.ndarray]]
    head: Mapping[str, chex.Array]
    digests: Mapping[str, str]


def make_task(
    name: str,
    splits: Mapping[str, Mapping[str, np.ndarray]],
    prototypes: chex.Array,
    width: int,
    *,
    identity: Any,
) -> TaskData:
    """A task from its rows and its prototypes.

    Args:
      name: the task's name.
      splits: rows by split.
      prototypes: [C, D] unit rows.
      width: classes that the head is padded to.
      identity: plain data that say where the prototypes come from; hashed in their
        place, since their last bits depend on the machine.
    """
    classes = prototypes.shape[0]
    head = {
        "prototypes": jnp.pad(prototypes, ((0, width - classes), (0, 0))),
        "active": jnp.arange(width) < classes,
    }
    origin = json.dumps([classes, identity], sort_keys=True, default=str)
    text = np.frombuffer(origin.encode(), np.uint8)
    return TaskData(
        name=name,
        num_classes=classes,
        splits=splits,
        head=head,
        digests={n: io.digest({"rows": x, "head": text}) for n, x in splits.items()},
    )


def load_tasks(
    encoder: Encoder,
    names: Sequence[str],
    *,
    train: int,
    validation: int,
    test: int,
    progress: Any,
) -> tuple[TaskData, ...]:
    """Rows and heads of tasks of the data layer, prepared on first use.

    Args:
      encoder: makes the heads.
      names: tasks; see `data.tasks`.
      train: most rows of the training split.
      validation: most rows of the validation split.
      test: most rows of the test split.
      progress: a `report.Progress`.

    Raises:
      ValueError: no task, a task named twice, or an unknown one.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"load_tasks: wanted at least one task, each once; found {list(names)}"
        )
    tasks = [data.get(name) for name in names]
    width = max(task.num_classes for task in tasks)
    limits = {"train": train, "validation": validation, "test": test}
    loaded, base = [], io.digest(encoder.params)
    with progress.task("load tasks", total=len(tasks)) as bar:
        for task in tasks:
            transform = _transform(encoder, task)
            splits = {
                split: data.to_arrays(
                    data.load_source(task.name, split), transform, limit
                )
                for split, limit in limits.items()
            }
            prototypes = encoder.prototypes(task, splits["train"])
            identity = [encoder.name, base, encoder.head_source, task.prompts]
            loaded.append(
                make_task(task.name, splits, prototypes, width, identity=identity)
            )
            bar.advance(task=task.name)
    return tuple(loaded)


def _transform(encoder: Encoder, task: data.Task) -> Any:
    """Stored rows to what the encoder takes."""
    if task.kind == "text":
        length = min(task.length, encoder.max_length or task.length)
        return data.transform(task, length=length)
    if encoder.image_stats is None:
        return data.transform(task, size=encoder.image_size)
    mean, std = encoder.image_stats
    return data.Normalize(encoder.image_size, mean, std)
