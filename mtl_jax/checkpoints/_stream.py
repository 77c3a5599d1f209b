"""Chunks of one tensor of all models, side by side in a buffer that is used again."""

import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mtl_jax.checkpoints._rule_types import Job, View

_CARRIERS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {2: np.int16, 4: np.int32}
_INFINITY = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F800000,
}
KEPT = 48 << 20  # Bytes of a tensor, all models, that are read only once.
_ALIGN = 64  # Arrays that start at multiples of it are passed without a copy.
_FLOAT32 = np.dtype(np.float32)


class Chunk(NamedTuple):
    """Part of a tensor.

    Attributes:
      number: of the chunk in its tensor.
      start: index of its first entry.
      length: how many entries.
      data: [M, C], of which [:, :length] are entries and the rest is zero. The next
        chunk may overwrite it.
    """

    number: int
    start: int
    length: int
    data: np.ndarray


class Buffers(threading.local):
    """Aligned memory that every thread uses again and again.

    Attributes:
      owner: the stream whose tensor is kept in it, if one is.
    """

    def __init__(self) -> None:
        self._raw: dict[str, np.ndarray] = {}
        self.owner: Any = None

    def get(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of this thread; what it was before is lost."""
        size = math.prod(shape) * dtype.itemsize
        raw = self._raw.get(name)
        if raw is None or raw.size < size:
            raw = self._raw[name] = _aligned(size)
        return raw[:size].view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    """Bytes, zero, that programs take without copying."""
    raw = np.zeros(size + _ALIGN, np.uint8)
    offset = -raw.ctypes.data % _ALIGN
    return raw[offset : offset + size]


def finite(values: np.ndarray) -> bool:
    """Whether there is no NaN or infinity, by two reductions of integers."""
    if not values.size:
        return True
    infinity = _INFINITY.get(values.dtype)
    if infinity is None:
        return bool(np.isfinite(values.astype(np.float64)).all())
    size = values.dtype.itemsize
    sign = 1 << (8 * size - 1)
    # As signed integers positive numbers are largest, as unsigned ones negative.
    return bool(
        values.view(_SIGNED[size]).max() < infinity
        and values.view(_UNSIGNED[size]).max() < infinity | sign
    )


class Stream:
    """The tensors of one job, read in chunks as often as a rule needs.

    Attributes:
      job: what is read.
      dtype: of the chunks: that of the tensors, or float32 where they differ.
      size: number of entries.
    """

    def __init__(self, job: Job, buffers: Buffers, chunk: int, check_finite: bool):
        self.job = job
        self.size = job.size
        self._buffers, self._chunk = buffers, chunk
        self._unchecked = check_finite
        dtypes = {np.dtype(view.spec.dtype) for view in job.views}
        one = next(iter(dtypes))
        self.dtype = one if len(dtypes) == 1 and one in _CARRIERS else _FLOAT32

    @property
    def row(self) -> int:
        """Length of the last axis; a vector is one row."""
        shape = self.job.spec.shape
        return shape[-1] if shape else 1

    def bounds(self, *, rows: bool = False) -> tuple[int, int]:
        """Entries per chunk, and the size that chunks are padded to."""
        if not rows:
            return self._chunk, self._chunk
        if self.row <= self._chunk:
            return self._chunk // self.row * self.row, self._chunk
        return self.row, 1 << (self.row - 1).bit_length()

    def chunks(self, *, rows: bool = False) -> Iterator[Chunk]:
        """Goes through the tensor once; a small one is kept, others are read again.

        Args:
          rows: a chunk holds whole rows.

        Raises:
          ValueError: an entry is not finite, in the first pass where that is checked.
        """
        step, padded = self.bounds(rows=rows)
        count, models = -(-self.size // step), len(self.job.views)
        kept = count * models * padded * self.dtype.itemsize <= KEPT
        shape = (count if kept else 1, models, padded)
        data = self._buffers.get("chunks", shape, self.dtype)
        ready = self._buffers.owner == (self, rows)
        self._buffers.owner = None
        check, self._unchecked = self._unchecked, False
        for number, start in enumerate(range(0, self.size, step)):
            length = min(step, self.size - start)
            part = data[number if kept else 0]
            if not ready:
                self._read(part, start, length, check)
            yield Chunk(number, start, length, part)
        self._buffers.owner = (self, rows) if kept else None

    def _read(self, data: np.ndarray, start: int, length: int, check: bool) -> None:
        for index, view in enumerate(self.job.views):
            _load(data[index, :length], view, start)
            if check and not finite(data[index, :length]):
                raise ValueError(
                    f"{self.job.rule}: {self.job.name!r}: NaN or infinity in "
                    f"{self.job.model(index)}"
                )
        data[:, length:].view(np.uint8)[...] = 0

    def sample(self, step: int) -> np.ndarray:
        """Every so many entries, float32 [M, n].

        The step is changed a little so that it visits all columns of a matrix.
        """
        while step > 1 and math.gcd(step, max(self.row, 1)) > 1:
            step += 1
        found, offset = [np.zeros((len(self.job.views), 0), np.float32)], 0
        for chunk in self.chunks():
            if offset < chunk.length:
                # Contiguous first: a cast with strides is many times slower.
                part = _bits(chunk.data)[:, offset : chunk.length : step].copy()
                found.append(part.view(self.dtype).astype(np.float32))
            offset = (offset - chunk.length) % step
        return np.concatenate(found, axis=1)


def _bits(x: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return x.view(_UNSIGNED[x.dtype.itemsize])


def _load(out: np.ndarray, view: View, start: int) -> None:
    """Entries from `start` on; straight from the file where that can be."""
    fill = getattr(view, "fill", None)
    if fill is not None and view.spec.dtype == out.dtype:
        fill(start, out)
        return
    part = np.asarray(view.flat(start, start + out.size))
    if part.dtype == out.dtype:
        _bits(out)[...] = _bits(part)
    else:
        out[...] = part.astype(np.float32)
