"""How likely DELLA keeps an entry, by its rank."""

import numpy as np
import pytest

from mtl_jax.checkpoints import _draws, rules
from mtl_jax.checkpoints import _ranks as ranks
from mtl_jax.checkpoints._stream import Buffers
from mtl_jax.checkpoints._work import Work
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

ROWS, LENGTH = 4000, 8


def drawn(row, *, kind=ranks.Ranks, seed=0, chunk=1 << 15, **options):
    """How often each entry of a row was kept, of many equal rows."""
    deltas = np.tile(np.asarray(row, np.float32), (ROWS, 1))
    job = rules.Job(
        name="w",
        spec=TensorSpec(deltas.shape, deltas.dtype),
        rule="della",
        base=ArrayView(np.zeros_like(deltas)),
        experts=(ArrayView(deltas),),
        options={"weight": 1.0, **options},
    )
    work = Work(job, None, Buffers(), chunk=chunk, seed=seed, check_finite=True)
    selection = kind(work)
    found = [
        selection.args(part)["mask"][0, : part.length] & 1
        for part in work.stream.chunks(rows=True)
    ]
    return np.concatenate(found).reshape(deltas.shape)


def mean_rank(row):
    size = np.abs(row)
    return np.array([(size < x).sum() + ((size == x).sum() - 1) / 2 for x in size])


@pytest.mark.parametrize(
    "row",
    [
        [3.0, -1.0, 0.5, 7.0, -8.0, 0.1, 2.0, 4.0],
        [1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 2.0, 5.0, 5.0, -5.0, 9.0],
    ],
)
def test_chances_grow_with_the_rank(row):
    share = drawn(row, density=0.5, epsilon=0.3).mean(0)
    wanted = 0.2 + 0.6 * mean_rank(np.array(row)) / (LENGTH - 1)
    # Five standard deviations of a share of 4000.
    np.testing.assert_allclose(share, wanted, rtol=0, atol=0.04)


def test_rows_are_ranked_apart():
    rows = np.array([[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4], [9.0, 8.0, 6.0, 7.0]])
    share = drawn(rows, density=0.5, epsilon=0.4, chunk=1 << 10)
    share = share.reshape(ROWS, *rows.shape).mean(0)
    wanted = [0.1 + 0.8 * mean_rank(row) / 3 for row in rows]
    np.testing.assert_allclose(share, wanted, rtol=0, atol=0.04)


def test_without_spread_all_ranks_are_alike():
    share = drawn(np.arange(LENGTH), density=0.7, epsilon=0.0).mean(0)
    np.testing.assert_allclose(share, 0.7, rtol=0, atol=0.04)


@pytest.mark.parametrize(("density", "share"), [(1.0, 1), (0.0, 0)])
def test_everything_and_nothing(density, share):
    assert (drawn(np.arange(LENGTH), density=density) == share).all()


def test_draws_do_not_depend_on_chunks_nor_on_memory(monkeypatch):
    row = [3.0, -1.0, 0.5, 7.0, -8.0, 0.1, 2.0, 4.0]
    whole = drawn(row, density=0.5)
    assert (whole == drawn(row, density=0.5, chunk=1000)).all()
    monkeypatch.setattr(_draws, "KEPT", 0)
    assert (whole == drawn(row, density=0.5)).all()


def test_rows_longer_than_a_chunk_are_read_as_a_whole():
    rows = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)

    def masks(chunk):
        job = rules.Job(
            name="w",
            spec=TensorSpec(rows.shape, rows.dtype),
            rule="della",
            base=ArrayView(np.zeros_like(rows)),
            experts=(ArrayView(rows),),
            options={"weight": 1.0, "density": 0.5},
        )
        work = Work(job, None, Buffers(), chunk=chunk, seed=0, check_finite=True)
        parts = list(work.stream.chunks(rows=True))
        assert [part.length for part in parts] == [40] * 3 if chunk < 80 else [120]
        selection = ranks.Ranks(work)
        return [selection.args(p)["mask"][0, : p.length] for p in parts]

    assert (np.concatenate(masks(16)) == np.concatenate(masks(128))).all()


def test_entries_are_drawn_independently():
    mask = drawn(np.arange(LENGTH), density=0.5, epsilon=0.1).astype(float)
    within = np.corrcoef(mask.T) - np.eye(LENGTH)
    after = np.corrcoef(mask[1:].T, mask[:-1].T)[:LENGTH, LENGTH:]
    assert np.abs(within).max() < 0.08 and np.abs(after).max() < 0.08


def test_mean_ranks():
    values = np.random.default_rng(0).integers(0, 6, (20, 9)).astype(np.uint32)
    wanted = [mean_rank(row.astype(float)) for row in values]
    np.testing.assert_array_equal(ranks.mean_ranks(values), wanted)
