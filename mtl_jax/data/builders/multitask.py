"""What the builders of multi-task problems share."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mtl_jax.data import multitask

Table = Mapping[str, np.ndarray]
"""Rows of one split: the problem's keys, arrays that lead with the rows."""


class MultiTaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes one problem of the registry. Subclasses name it and make its tables."""

    VERSION = tfds.core.Version("1.0.0")
    code_path: ClassVar[None] = None
    problem_name: ClassVar[str]
    citation: ClassVar[str] = ""
    # Inputs are stored as bytes where they are images.
    stored: ClassVar[type] = np.float32

    @abc.abstractmethod
    def tables(self) -> Mapping[str, Table]:
        """The rows of every split."""

    @property
    def problem(self) -> multitask.MultiTask:
        """The registry entry."""
        return multitask.get(self.problem_name)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            key: tfds.features.Tensor(
                shape=wanted.shape,
                dtype=self.stored,
                encoding=tfds.features.Encoding.ZLIB,
            )
            for key, wanted in self.problem.inputs.items()
        }
        for key, dtype in self.problem.labels.items():
            features[key] = tfds.features.Scalar(dtype.type)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.problem.source,
            citation=self.citation,
            license=self.problem.licence,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            name: self._generate_examples(rows) for name, rows in self.tables().items()
        }

    def _generate_examples(self, rows):
        wanted = {*self.problem.inputs, *self.problem.labels}
        if set(rows) != wanted:
            raise ValueError(
                f"{self.problem_name}: rows have {sorted(rows)}, wanted "
                f"{sorted(wanted)}"
            )
        keys = sorted(rows)
        for position, values in enumerate(zip(*(rows[k] for k in keys), strict=True)):
            yield position, dict(zip(keys, values, strict=True))
