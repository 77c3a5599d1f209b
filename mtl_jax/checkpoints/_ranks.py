"""DELLA: chances of being kept that grow with the rank of a change in its row."""

from typing import Any

import jax
import numpy as np

from mtl_jax.checkpoints import _draw_programs, _programs
from mtl_jax.checkpoints._draws import Drawn
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


class Ranks(_Rows, Drawn):
    """Draws against other entries: one is kept if it is not below a random rival.

    How many of its row are below an entry is its rank, so nothing is sorted. Equals
    share the mean of their ranks.
    """

    def __init__(self, work: Work):
        _Rows.__init__(self, work)
        Drawn.__init__(self, work)
        _, padded = work.stream.bounds(rows=True)
        index = np.arange(padded, dtype=np.int32)
        first = index // self._length * self._length
        self._places = (first, np.int32(self._length - 1))

    def _draw(self, chunk: Chunk) -> jax.Array:
        values = _programs.magnitudes(chunk.data)
        drawn = (self._keys, halves(chunk.start), self._chance, self._places)
        places = _draw_programs.rivals(values, *drawn)
        others = _draw_programs.look_up(values, places)
        return _draw_programs.rank_mask(values, others, *drawn)


class Chances(_Rows):
    """Computes the chance of every entry, for those that divide by it."""

    kind = "chance"

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """Keys, and the chance of every entry."""
        values = np.asarray(_programs.magnitudes(chunk.data))
        chance = np.ones(values.shape, np.float32)
        shape = (len(values), -1, self._length)
        rows = chance[:, : chunk.length].reshape(shape)
        low, high = self._chance.T[..., None, None]
        last = self._length - 1
        if last:
            ranks = mean_ranks(values[:, : chunk.length].reshape(shape))
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
