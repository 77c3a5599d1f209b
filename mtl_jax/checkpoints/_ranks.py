"""DELLA: chances of being kept that grow with the rank of a change in its row."""

from typing import Any

import numpy as np

from mtl_jax.checkpoints import _programs
from mtl_jax.checkpoints._stream import Chunk
from mtl_jax.checkpoints._work import Work, halves


def _chances(work: Work) -> np.ndarray:
    """float32 [T, 2], of the smallest and the largest entry of a row."""
    density, spread = work.weights("density"), work.weights("epsilon")
    low, high = density - spread, density + spread
    # Beyond the ends everything is kept, or nothing.
    low, high = (
        np.where(density >= 1, 2, np.where(density <= 0, -1, c)) for c in (low, high)
    )
    return np.stack([low, high], -1).astype(np.float32)


class _Rows:
    """What both ways of drawing share."""

    rows = True

    def __init__(self, work: Work):
        self._keys = work.keys()
        self._chance = _chances(work)
        self._length = max(work.stream.row, 1)
        self._buffers = work.buffers

    def _sorted_rows(self, chunk: Chunk, lanes: np.ndarray) -> np.ndarray:
        """[T, rows, length] of [T, C]."""
        return lanes[:, : chunk.length].reshape(len(lanes), -1, self._length)


class Ranks(_Rows):
    """Draws against order statistics: an entry is kept if it is not below a random one.

    The row is sorted, but no entry looks for its own rank. Equals share the mean of
    their ranks.
    """

    kind = "rank"

    def __init__(self, work: Work):
        super().__init__(work)
        _, padded = work.stream.bounds(rows=True)
        index = np.arange(padded, dtype=np.int32)
        first = index // self._length * self._length
        self._places = np.stack([first, np.full_like(first, self._length - 1)])

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """Keys, chances, rows, and magnitudes in the order of their rows."""
        values = np.asarray(_programs.magnitudes(chunk.data))
        order = self._buffers.get("order", values.shape, values.dtype)
        rows = self._sorted_rows(chunk, order)
        rows[...] = np.sort(self._sorted_rows(chunk, values), axis=-1)
        repeated = rows[..., 1:] == rows[..., :-1]
        rows <<= np.uint32(1)
        rows[..., 1:] |= repeated
        return {
            "keys": self._keys,
            "start": halves(chunk.start),
            "chances": self._chance,
            "rows": self._places,
            "order": order,
        }


class Chances(_Rows):
    """Computes the chance of every entry, for those that divide by it."""

    kind = "chance"

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """Keys, and the chance of every entry."""
        values = np.asarray(_programs.magnitudes(chunk.data))
        chance = np.ones(values.shape, np.float32)
        rows = self._sorted_rows(chunk, chance)
        low, high = self._chance.T[..., None, None]
        last = self._length - 1
        if last:
            ranks = mean_ranks(self._sorted_rows(chunk, values))
            rows[...] = low + (high - low) * (ranks / np.float32(last))
        else:
            rows[...] = (low + high) / 2
        np.clip(chance, 0, 1, out=chance)
        return {"keys": self._keys, "start": halves(chunk.start), "chance": chance}


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 0; equals share the mean of theirs.

    Args:
      values: uint32 [..., n].

    Returns:
      float32 of that shape.
    """
    length = values.shape[-1]
    index = np.arange(length, dtype=np.uint64)
    order = np.sort(values.astype(np.uint64) << np.uint64(32) | index, axis=-1)
    places = (order & np.uint64(0xFFFFFFFF)).astype(np.int64)
    values = (order >> np.uint64(32)).astype(np.uint32)
    new = np.ones(values.shape, bool)
    new[..., 1:] = values[..., 1:] != values[..., :-1]
    here = np.arange(length)
    first = np.maximum.accumulate(np.where(new, here, 0), axis=-1)
    ends = np.ones(values.shape, bool)
    ends[..., :-1] = new[..., 1:]
    backwards = np.where(ends, here, length)[..., ::-1]
    last = np.minimum.accumulate(backwards, axis=-1)[..., ::-1]
    ranks = np.empty(values.shape, np.float32)
    np.put_along_axis(ranks, places, ((first + last) / 2).astype(np.float32), axis=-1)
    return ranks
