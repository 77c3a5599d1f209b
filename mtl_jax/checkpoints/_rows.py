"""Views of tensors with gathered rows: vocabularies put in another order."""

import functools
import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["AVERAGE", "MEAN", "ZERO", "RowMap", "RowsView", "digest"]

ZERO, AVERAGE, MEAN = -1, -2, -3


class RowMap(NamedTuple):
    """Where every row of a model's new tensor comes from.

    Attributes:
      donor: int32 [V], position of the model that gives the row; or ZERO, AVERAGE (of
        the rows that `averages` lists), MEAN (of the first `named` new rows).
      row: int64 [V], row of the donor; for AVERAGE, position in `averages`.
      averages: (model, row) pairs that are averaged.
      named: how many rows stand for tokens.
    """

    donor: np.ndarray
    row: np.ndarray
    averages: tuple[tuple[tuple[int, int], ...], ...]
    named: int

    def is_identity(self, own: int, rows: int) -> bool:
        """Whether the tensor of model `own`, with `rows` rows, stays as it is."""
        return (
            len(self.row) == rows
            and bool((self.donor == own).all())
            and bool((self.row == np.arange(rows)).all())
        )


def digest(maps: Sequence[RowMap]) -> str:
    """Changes whenever a row comes from elsewhere."""
    out = hashlib.sha256()
    for rows in maps:
        out.update(rows.donor.tobytes())
        out.update(rows.row.tobytes())
        out.update(repr((rows.averages, rows.named)).encode())
    return out.hexdigest()


class RowsView:
    """A tensor of gathered rows, read only where it is asked for.

    The dtype is the model's own, but float32 where rows are averages and the own dtype
    is narrower: averages are rounded once, with the output.

    Args:
      views: the tensor in every model, by position.
      own: position of the model whose tensor this is.
      rows: the map.
    """

    def __init__(self, views: Sequence[Any], own: int, rows: RowMap):
        spec = views[own].spec
        averaged = (rows.donor == AVERAGE) | (rows.donor == MEAN)
        dtype = np.dtype(spec.dtype)
        if averaged.any() and dtype.itemsize < 4:
            dtype = np.dtype(np.float32)
        self.spec = type(spec)((len(rows.row), *spec.shape[1:]), dtype)
        self._views = views
        self._map = rows
        self._width = math.prod(spec.shape[1:])
        self._lock = threading.Lock()

    def whole(self) -> np.ndarray:
        """All of it."""
        return self._rows(0, len(self._map.row)).reshape(self.spec.shape)

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries start:stop in row-major order."""
        width = self._width
        if stop <= start or not width:
            return np.zeros(0, self.spec.dtype)
        first = start // width
        rows = self._rows(first, -(-stop // width)).reshape(-1)
        return rows[start - first * width : stop - first * width]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        donor = self._map.donor[start:stop]
        row = self._map.row[start:stop]
        out = np.zeros((stop - start, self._width), self.spec.dtype)
        if not len(row):
            return out
        # Runs of rows that lie behind each other in one donor are read at once.
        jump = (np.diff(donor) != 0) | (np.diff(row) != 1)
        edges = [0, *(np.flatnonzero(jump) + 1).tolist(), len(row)]
        for begin, end in zip(edges, edges[1:], strict=False):
            if donor[begin] >= 0:
                out[begin:end] = self._read(
                    int(donor[begin]), int(row[begin]), end - begin
                )
        for i in np.flatnonzero(donor == AVERAGE):
            out[i] = self._average(int(row[i]))
        padding = donor == MEAN
        if padding.any():
            with self._lock:
                out[padding] = self._mean
        return out

    def _read(self, model: int, row: int, count: int) -> np.ndarray:
        width = self._width
        values = self._views[model].flat(row * width, (row + count) * width)
        return values.reshape(count, width)

    def _average(self, position: int) -> np.ndarray:
        parts = self._map.averages[position]
        total = sum(self._read(m, r, 1)[0].astype(np.float64) for m, r in parts)
        return np.asarray(total / len(parts))

    @functools.cached_property
    def _mean(self) -> np.ndarray:
        named, step = self._map.named, max((1 << 20) // max(self._width, 1), 1)
        total = np.zeros(self._width)
        for start in range(0, named, step):
            rows = self._rows(start, min(start + step, named))
            total += rows.sum(0, dtype=np.float64)
        return total / max(named, 1)
