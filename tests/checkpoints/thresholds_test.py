"""Exact order statistics of streams, against sorting."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.checkpoints import _thresholds as thresholds
from mtl_jax.checkpoints import rules
from mtl_jax.checkpoints._stream import Buffers, Stream
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

CHUNK = 256


def stream(values):
    """A tensor whose magnitudes are what is ranked."""
    values = np.asarray(values, np.float32)
    job = rules.Job(
        name="w",
        spec=TensorSpec(values.shape, values.dtype),
        rule="linear",
        base=None,
        experts=(ArrayView(values),),
        options={"weight": 1.0},
    )
    return Stream(job, Buffers(), CHUNK, True)


def lanes(chunk):
    return jnp.asarray(chunk.data.view(np.uint32) & np.uint32(0x7FFFFFFF))


def sampled(values):
    return np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)


def kept(one, cut):
    """Mask of the entries that a cut keeps."""
    found = []
    for chunk in one.chunks():
        row = np.asarray(lanes(chunk))[0, : chunk.length]
        limit = cut.limit(chunk.number, lambda row=row: row)
        index = np.arange(chunk.length)
        found.append((row > cut.bits) | ((row == cut.bits) & (index < limit)))
    return np.concatenate(found or [np.zeros(0, bool)])


def wanted(values, k):
    """The k largest that are not zero, first among equals."""
    size = np.abs(np.asarray(values, np.float32)).ravel()
    mask = np.zeros(size.size, bool)
    mask[np.argsort(-size, kind="stable")[:k]] = True
    return mask & (size > 0)


def check(values, ks):
    one = stream(values)
    (found,) = thresholds.select([one], [lanes], sampled, [ks])
    for k, cut in zip(ks, found[0], strict=True):
        mask = kept(one, cut) & (np.asarray(values).ravel() != 0)
        np.testing.assert_array_equal(mask, wanted(values, k))


@hypothesis.given(
    st.integers(0, 2**31),
    st.integers(1, 1500),
    st.sampled_from(["normal", "few", "zeros"]),
)
def test_keeps_exactly_k(seed, size, kind):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=size)
    if kind == "few":
        values = rng.integers(-3, 4, size=size)
    elif kind == "zeros":
        values *= rng.random(size) < 0.2
    check(values, [0, size // 7, size // 2, size])


def test_a_sample_that_brackets_is_enough(monkeypatch):
    """With few samples brackets are narrow, and the histogram is not needed."""
    monkeypatch.setattr(thresholds, "_SAMPLES", 512)
    monkeypatch.setattr(thresholds, "_coarse", None)
    rng = np.random.default_rng(0)
    check(rng.normal(size=(30, 500)), [100, 7500, 14990])
    # Heavy values, as differences of bfloat16 numbers have.
    check(np.round(rng.normal(size=(30, 500)), 1), [100, 3000, 7500])


def test_a_sample_that_misleads(monkeypatch):
    """Every entry that is looked at is small: the histogram finds the others."""
    monkeypatch.setattr(thresholds, "_SAMPLES", 128)
    values = np.random.default_rng(0).normal(size=4096) + 10
    values[::32] = 1e-3
    one = stream(values.reshape(64, 64))
    monkeypatch.setattr(one, "sample", lambda step: np.full((1, 128), 1e-3, np.float32))
    (found,) = thresholds.select([one], [lanes], sampled, [[1000, 4000]])
    for k, cut in zip([1000, 4000], found[0], strict=True):
        np.testing.assert_array_equal(kept(one, cut), wanted(values, k))


def test_several_tensors_are_one_vector():
    rng = np.random.default_rng(1)
    parts = [
        np.round(rng.normal(size=n) * s, 1) for n, s in ((700, 1), (0, 1), (333, 5))
    ]
    streams = [stream(p) for p in parts]
    found = thresholds.select(streams, [lanes] * 3, sampled, [[400]])
    masks = [kept(s, cuts[0][0]) for s, cuts in zip(streams, found, strict=True)]
    np.testing.assert_array_equal(
        np.concatenate(masks), wanted(np.concatenate(parts), 400)
    )


def test_nothing_is_sorted_but_the_sample(monkeypatch):
    """Of many entries few are collected."""
    collected = []
    add = thresholds.Tally.add

    def count(self, row, classes, value):
        add(self, row, classes, value)
        collected.append(self.inside[-1].values.size)

    monkeypatch.setattr(thresholds.Tally, "add", count)
    check(np.random.default_rng(0).normal(size=(200, 1000)), [100_000])
    assert sum(collected) < 0.06 * 200_000


@pytest.mark.parametrize("size", [0, 1, 2])
def test_small(size):
    check(np.arange(size) + 1.0, [0, size // 2, size])
