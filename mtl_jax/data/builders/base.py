"""What all builders share: configurations, features, splits by content."""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mtl_jax.data import splits, task

TEXT_LIMIT = 6000
"""Rows of a text task in the `default` configuration, over all splits together."""


class TaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes one task of the registry.

    Subclasses name the task and yield its raw rows. The `default` configuration
    keeps at most 6,000 rows of a text task, taken from the classes in turn (so
    classes are as balanced as their sizes allow); `full` keeps all rows as they
    come. Splits depend on content alone: 80/10/10 by hash.
    """

    VERSION = tfds.core.Version("1.0.1")
    BUILDER_CONFIGS: ClassVar[list] = [
        tfds.core.BuilderConfig(name="default", description="bounded, balanced"),
        tfds.core.BuilderConfig(name="full", description="every row"),
    ]
    # TFDS looks beside the code for checksums of its own downloads, of which there are
    # none here, and needs an undeclared package to do so.
    code_path: ClassVar[None] = None
    task_name: ClassVar[str]
    citation: ClassVar[str] = ""

    @abc.abstractmethod
    def rows(self) -> Iterator[splits.Row]:
        """Yields every raw row of the task."""

    @property
    def task(self) -> task.Task:
        """The registry entry."""
        return task.get(self.task_name)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "label": tfds.features.ClassLabel(names=list(self.task.class_names))
        }
        if self.task.kind == "text":
            features["text"] = tfds.features.Text()
        else:
            features["image"] = tfds.features.Tensor(
                shape=self.task.image_shape,
                dtype=np.uint8,
                encoding=tfds.features.Encoding.ZLIB,
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.task.source,
            citation=self.citation,
            license=self.task.licence,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        bounded = self.task.kind == "text" and not (config and config.name == "full")
        table = splits.assign(self.rows(), TEXT_LIMIT if bounded else None)
        return {name: self._generate_examples(rows) for name, rows in table.items()}

    def _generate_examples(self, rows):
        field = "text" if self.task.kind == "text" else "image"
        for position, row in enumerate(rows):
            yield position, {field: row.value, "label": row.label}
