import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import _rows
from mtl_jax.checkpoints._rows import AVERAGE, MEAN, ZERO, RowMap, RowsView
from mtl_jax.checkpoints.source import ArrayView

pytestmark = pytest.mark.fast


def oracle(tensors, rows):
    """Row by row, in float64; the mean of what precedes it last."""
    out = np.zeros((len(rows.row), *tensors[0].shape[1:]))
    for i, (donor, row) in enumerate(zip(rows.donor, rows.row, strict=True)):
        if donor >= 0:
            out[i] = tensors[donor][row]
        elif donor == AVERAGE:
            parts = rows.averages[row]
            out[i] = np.mean([tensors[m][r].astype(float) for m, r in parts], axis=0)
    for i, donor in enumerate(rows.donor):
        if donor == MEAN:
            out[i] = out[: rows.named].mean(axis=0)
    return out


@hypothesis.given(st.integers(0, 2**31), st.integers(0, 3), st.booleans())
def test_rows_are_gathered(seed, width, padded):
    rng = np.random.default_rng(seed)
    tensors = [rng.normal(size=(n, width)).astype(np.float32) for n in (5, 7)]
    count = int(rng.integers(1, 12))
    donor = rng.choice([0, 1, ZERO, AVERAGE], size=count).astype(np.int32)
    row = rng.integers(0, 5, size=count)
    averages = tuple(((0, int(a)), (1, int(b))) for a, b in rng.integers(0, 5, (5, 2)))
    if padded:
        donor, row = np.append(donor, [MEAN, MEAN]).astype(np.int32), np.append(row, 0)
        row = np.append(row, 0)
    rows = RowMap(donor, row, averages, count)
    view = RowsView([ArrayView(t) for t in tensors], 0, rows)
    wanted = oracle(tensors, rows)
    assert view.spec.shape == wanted.shape
    np.testing.assert_allclose(view.whole(), wanted, rtol=1e-5, atol=1e-6)
    flat = wanted.reshape(-1)
    start, stop = sorted(rng.integers(0, flat.size + 1, 2).tolist())
    np.testing.assert_array_equal(
        view.flat(start, stop), view.whole().reshape(-1)[start:stop]
    )


def test_averages_are_not_rounded_to_the_stored_type():
    tensors = [np.asarray([[v]], ml_dtypes.bfloat16) for v in (1.0, 1.0078125)]
    own = RowMap(np.zeros(1, np.int32), np.zeros(1, np.int64), (), 1)
    assert RowsView([ArrayView(t) for t in tensors], 0, own).spec.dtype == (
        ml_dtypes.bfloat16
    )
    mean = RowMap(
        np.full(1, AVERAGE, np.int32), np.zeros(1, np.int64), (((0, 0), (1, 0)),), 1
    )
    view = RowsView([ArrayView(t) for t in tensors], 0, mean)
    assert view.spec.dtype == np.float32 and view.whole()[0, 0] == 1.00390625


def test_vectors_have_rows_too():
    view = RowsView(
        [ArrayView(np.arange(4.0, dtype=np.float32))],
        0,
        RowMap(np.zeros(3, np.int32), np.array([2, 3, 0]), (), 3),
    )
    np.testing.assert_array_equal(view.whole(), [2, 3, 0])


def test_identity():
    rows = RowMap(np.zeros(3, np.int32), np.arange(3), (), 3)
    assert rows.is_identity(0, 3)
    assert not rows.is_identity(1, 3) and not rows.is_identity(0, 4)
    assert not rows._replace(row=np.array([0, 2, 1])).is_identity(0, 3)


def test_digests_tell_maps_apart():
    rows = RowMap(np.zeros(3, np.int32), np.arange(3), (), 3)
    others = [
        rows._replace(row=np.array([0, 2, 1])),
        rows._replace(donor=np.array([0, 0, 1], np.int32)),
        rows._replace(averages=(((0, 1), (1, 1)),)),
    ]
    found = {_rows.digest([r]) for r in (rows, *others)}
    assert len(found) == 4 and _rows.digest([rows]) in found
