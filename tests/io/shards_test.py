import json

import hypothesis
import hypothesis.strategies as st
import pytest

from mtl_jax.io import shards

pytestmark = pytest.mark.fast


@hypothesis.given(st.lists(st.integers(0, 9), min_size=1), st.integers(1, 12))
def test_files_are_filled_one_after_the_other(sizes, limit):
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    files = shards.divide(named, limit)
    assert [name for names in files.values() for name in names] == list(named)
    assert sorted(files) == list(files)
    totals = [sum(named[name] for name in names) for names in files.values()]
    parts = list(files.values())
    for total, names, rest in zip(totals, parts, [*parts[1:], None], strict=True):
        assert total <= limit or len(names) == 1
        # The next one did not fit any more.
        assert rest is None or total + named[rest[0]] > limit


def test_index_says_where_tensors_lie():
    text = shards.index({"x": ["a", "b"], "y": ["c"]}, {"a": 1, "b": 2, "c": 4})
    assert json.loads(text) == {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "x", "b": "x", "c": "y"},
    }


def test_few_names_and_how_many_more():
    assert shards.some(["a", "b"]) == "'a', 'b'"
    assert shards.some(list("abcdef")) == "'a', 'b', 'c', 'd' and 2 more"
