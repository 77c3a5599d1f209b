"""Shape and colour of a drawing, from the answers to questions about it."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder
from mtl_jax.data.builders.digits import image_row
from mtl_jax.data.vision_tasks import COLORS, SHAPES

_ROOT = "easy_vqa/data"


def image_labels(
    questions: Sequence[tuple[str, str, int]], names: Sequence[str]
) -> dict[int, int]:
    """Image number -> label, from the answers that are one of `names`.

    Raises:
      ValueError: two answers about one image disagree.
    """
    labels: dict[int, int] = {}
    for _, answer, image in questions:
        if answer in names:
            label = names.index(answer)
            if labels.setdefault(image, label) != label:
                raise ValueError(
                    f"easy_vqa: image {image} is both {names[labels[image]]!r} and "
                    f"{answer!r}"
                )
    return labels


def halve(image: np.ndarray) -> np.ndarray:
    """[64, 64, 3] uint8 -> [32, 32, 3] uint8 by 2x2 means."""
    return np.round(image.reshape(32, 2, 32, 2, 3).mean((1, 3))).astype(np.uint8)


def _decode(png: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


class _EasyVqa(TaskBuilder, skip_registration=True):
    names: Sequence[str]

    def rows(self) -> Iterator[splits.Row]:
        with zipfile.ZipFile(wheels.fetch(packages.EASY_VQA)) as box:
            for part in ("train", "test"):
                questions = json.loads(box.read(f"{_ROOT}/{part}/questions.json"))
                labels = image_labels(questions, self.names)
                yield from self._part(box, part, labels)

    def _part(
        self, box: zipfile.ZipFile, part: str, labels: Mapping[int, int]
    ) -> Iterator[splits.Row]:
        for number, label in sorted(labels.items()):
            pixels = _decode(box.read(f"{_ROOT}/{part}/images/{number}.png"))
            row = image_row(halve(pixels), label, "test" if part == "test" else "")
            if part == "train":
                # The package keeps its own test images: train gives the other two.
                held_out = splits.split_of(row.key) != "train"
                row = image_row(row.value, label, "validation" if held_out else "train")
            yield row


class MtlEasyVqaShape(_EasyVqa):
    """Drawings labelled with their shape."""

    task_name = "easy_vqa_shape"
    names = SHAPES


class MtlEasyVqaColor(_EasyVqa):
    """Drawings labelled with their colour."""

    task_name = "easy_vqa_color"
    names = COLORS
