import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import data
from mtl_jax.data import packing
from mtl_jax.data.packing import Packed, pack

pytestmark = pytest.mark.fast

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def documents(lengths):
    """Every token has a number of its own."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]


@given(
    LENGTHS,
    st.integers(1, 16),
    st.sampled_from(packing.METHODS),
    st.integers(1, 40),
    st.sampled_from([None, 1, 2]),
)
def test_no_token_is_lost_or_there_twice(lengths, size, method, window, most):
    """Kills rows that overflow, pieces out of order, windows that lose their end."""
    packed = Packed(
        documents(lengths), size, method=method, window=window, max_segments=most
    )
    seen = []
    for row in (packed[i] for i in range(len(packed))):
        used = row["segment_ids"] > 0
        seen += row["input_ids"][used].tolist()
        assert not row["input_ids"][~used].any() and not row["weights"][~used].any()
        assert (np.diff(used.astype(int)) <= 0).all(), "padding is at the end"
        numbers = row["segment_ids"][used]
        assert set(numbers) == set(range(1, numbers.max() + 1))
        assert numbers.max() <= (most or size)
        for number in set(numbers):
            place = row["segment_ids"] == number
            assert (row["positions"][place] == np.arange(place.sum())).all()
            assert (np.diff(row["input_ids"][place]) == 1).all(), "one document"
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
    assert packed.fill == pytest.approx(sum(lengths) / (len(packed) * size))


@given(LENGTHS, st.integers(20, 30))
def test_first_fit_needs_few_rows(lengths, size):
    """At most 11/9 of the fewest plus 6/9 (Dosa 2007); next fit has no fewer."""
    rows = [len(pack(lengths, size, method=method)) for method in packing.METHODS]
    fewest = -(-sum(lengths) // size)
    assert fewest <= rows[0] <= 11 / 9 * rows[1] + 6 / 9


def test_first_fit_takes_the_longest_first():
    rows = pack([3, 5, 2, 6, 4], 10)
    assert [[p.document for p in row] for row in rows] == [[3, 4], [0, 1, 2]]


def test_windows_stand_alone():
    """Rows of the first window do not depend on what comes later."""
    lengths = [3, 5, 2, 6, 4, 1, 7, 7]
    first = pack(lengths[:4], 8, window=4)
    assert pack(lengths, 8, window=4)[: len(first)] == first


def test_long_documents():
    (row, rest), cut = pack([5], 4), pack([5], 4, long="cut")
    assert row == (packing.Piece(0, 0, 4),) and rest == (packing.Piece(0, 4, 5),)
    assert cut == [(packing.Piece(0, 0, 4),)]
    with pytest.raises(ValueError, match="document 1 has 5 tokens, a row 4"):
        pack([2, 5], 4, long="error")


def test_weights_go_with_their_tokens():
    docs = [
        {"input_ids": np.array([5, 6]), "weights": np.array([0.0, 1.0])},
        {"input_ids": np.array([7]), "weights": np.array([0.5])},
    ]
    row = Packed(docs, 4, padding=9)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 9]
    assert row["weights"].tolist() == [0.0, 1.0, 0.5, 0.0]
    assert {k: v.dtype for k, v in row.items()} == {
        "input_ids": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "weights": np.float32,
    }
    docs[1]["weights"] = np.ones(3)
    with pytest.raises(ValueError, match="3 weights for a document of 1 tokens"):
        Packed(docs, 4)[0]


def test_rows_resume_by_their_number():
    pytest.importorskip("grain")
    packed = Packed(documents([3, 5, 2, 6, 4, 1, 7]), 8)
    batches = data.iterate(data.pipeline(packed, batch_size=2, seed=3), num_threads=0)
    want = [next(batches) for _ in range(6)]
    state = None
    batches = data.iterate(data.pipeline(packed, batch_size=2, seed=3), num_threads=0)
    for i in range(3):
        np.testing.assert_array_equal(next(batches)["input_ids"], want[i]["input_ids"])
    state = json.loads(json.dumps(batches.get_state()))
    again = data.iterate(data.pipeline(packed, batch_size=2, seed=3), num_threads=0)
    again.set_state(state)
    for i in range(3, 6):
        np.testing.assert_array_equal(next(again)["input_ids"], want[i]["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best_fit"}, "method is 'best_fit', wanted one of"),
        ({"long": "drop"}, "long is 'drop'"),
        ({"window": 0}, "window wants 1 or more"),
        ({"max_segments": 0}, "max_segments wants 1 or more"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        pack([1], 4, **options)
    with pytest.raises(ValueError, match="document 1 is empty"):
        pack([1, 0], 4)
