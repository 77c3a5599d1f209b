"""scikit-learn's handwritten digits."""

import hashlib
from collections.abc import Iterator

import numpy as np

from mtl_jax.data import splits
from mtl_jax.data.builders.base import TaskBuilder


def image_row(image: np.ndarray, label: int, split: str = "") -> splits.Row:
    """A row whose key is the image's bytes."""
    image = np.ascontiguousarray(image, np.uint8)
    return splits.Row(image, label, hashlib.sha256(image).hexdigest(), split=split)


def enlarge(image: np.ndarray) -> np.ndarray:
    """[8, 8] values in 0..16 -> [32, 32, 1] uint8, each pixel repeated."""
    scaled = np.round(image * (255 / 16)).astype(np.uint8)
    return scaled.repeat(4, 0).repeat(4, 1)[..., None]


class MtlDigits(TaskBuilder):
    """1,797 digits at 32x32."""

    task_name = "digits"

    def rows(self) -> Iterator[splits.Row]:
        """Every digit."""
        from sklearn import datasets

        flat, labels = datasets.load_digits(return_X_y=True)
        for image, label in zip(flat.reshape(-1, 8, 8), labels, strict=True):
            yield image_row(enlarge(image), int(label))
