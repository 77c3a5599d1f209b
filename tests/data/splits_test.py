import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax.data import splits

pytestmark = pytest.mark.fast

TEXTS = st.lists(st.tuples(st.text(max_size=6), st.integers(0, 3)), max_size=60)


def table(pairs, limit=None):
    return splits.assign([splits.text_row(t, y) for t, y in pairs], limit)


@hypothesis.given(TEXTS, st.randoms())
def test_splits_do_not_depend_on_order(pairs, random):
    def keys(t):
        return {
            name: [(row.key, row.label) for row in part] for name, part in t.items()
        }

    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert keys(table(pairs, 20)) == keys(table(shuffled, 20))


@hypothesis.given(TEXTS)
def test_no_content_is_in_two_splits_and_none_twice(pairs):
    keys = [row.key for part in table(pairs).values() for row in part]
    assert len(keys) == len(set(keys))


def test_spellings_of_one_text_are_one_row():
    found = table([("A  good film", 1), ("a good FILM ", 1), ("a good ﬁlm", 1)])
    rows = [row for part in found.values() for row in part]
    assert [row.value for row in rows] == ["A good film"]


def test_contradicting_labels_drop_the_text():
    rows = table([("x", 0), ("X", 1), ("y", 0)])
    assert [row.value for part in rows.values() for row in part] == ["y"]


def test_groups_stay_together():
    rows = [splits.text_row(f"text {i}", 0, group=str(i // 10)) for i in range(500)]
    where = {}
    for name, part in splits.assign(rows).items():
        for row in part:
            where.setdefault(row.group, set()).add(name)
    assert all(len(names) == 1 for names in where.values())
    assert len({name for names in where.values() for name in names}) == 3


def test_shares_are_80_10_10():
    found = [splits.split_of(str(i)) for i in range(20_000)]
    shares = [found.count(name) / 20_000 for name in ("train", "validation", "test")]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)


def test_splits_are_what_they_were():
    """A change here moves rows between train and test of every published number."""
    found = "".join(splits.split_of(str(i))[1] for i in range(24))
    assert found == "rrrrrrrrrrrrrrrrrrerrrer"


def test_a_source_may_fix_the_split():
    rows = [splits.Row(0, 0, str(i), split="test") for i in range(30)]
    assert len(splits.assign(rows)["test"]) == 30


def test_thinning_keeps_small_classes_whole():
    rows = [
        splits.text_row(f"{c} {i}", c)
        for c, n in enumerate((5, 100, 300))
        for i in range(n)
    ]
    kept = splits.thin(rows, 65)
    labels = [row.label for row in kept]
    assert [labels.count(c) for c in range(3)] == [5, 30, 30]
    assert splits.thin(rows, None) == splits.thin(rows, 10_000)


def test_thinning_is_nested():
    """A larger limit only adds rows, so a bounded task is a subset of the full one."""
    rows = [splits.text_row(f"{i}", i % 2) for i in range(200)]
    small, large = ({r.key for r in splits.thin(rows, n)} for n in (40, 90))
    assert small < large


@pytest.mark.parametrize("limit", [None, 400])
def test_the_order_of_a_split_mixes_classes(limit):
    """Also where one class was thinned much more than the other."""
    rows = [splits.text_row(f"{i}", int(i >= 800)) for i in range(1000)]
    labels = [row.label for row in splits.assign(rows, limit)["train"]]
    head, tail = np.mean(labels[:100]), np.mean(labels[-100:])
    assert abs(head - np.mean(labels)) < 0.15
    assert abs(tail - np.mean(labels)) < 0.15
