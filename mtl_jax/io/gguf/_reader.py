"""Reading tensors of a GGUF file: mapped, and decoded a few rows at a time."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mtl_jax.io.gguf import _header

# Values that are decoded at once: bounds what reading needs beside its result.
_CHUNK = 1 << 18


class GgufFile(Mapping[str, np.ndarray]):
    """Lazy read-only view of one file: opening checks the header, reading decodes.

    A local file is memory-mapped; on other file systems (`gs://`) each access reads
    its own byte range. Axes are in NumPy's order: a linear layer's weight is
    [out, in]. Quantised types decode to float32; plain ones keep their dtype, and
    those of a local file are views of the map.

    Attributes:
      path: where the file is.
      version: of the format, 2 or 3.
      metadata: key -> number, boolean, string, NumPy array of numbers or list.

    Args:
      path: a local path or anything `etils.epath` opens.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a well-formed little-endian GGUF file of version
        2 or 3, or has a tensor type that is not read; naming the fault.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        size = self.path.stat().length
        with self.path.open("rb") as f:
            header = _header.read(f, size, self.path)
        self.version: int = header.version
        self.metadata: dict[str, Any] = header.metadata
        self._entries = header.entries
        self._map = (
            np.memmap(self.path, np.uint8, "r") if os.path.exists(self.path) else None
        )

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.kind.decode is None:
            raw = self._bytes(entry.begin, entry.end)
            return raw.view(entry.kind.dtype).reshape(entry.shape)
        out = np.empty(entry.shape, entry.kind.dtype)
        self.read_into(name, out)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor once decoded, without reading it."""
        return self._entries[name].kind.dtype

    def kind(self, name: str) -> str:
        """Element type as the file stores it, such as "Q4_1"."""
        return self._entries[name].kind.name

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Decodes a tensor into an array that exists, some rows at a time.

        Beside `out` this needs a few MiB, or a few rows where one is longer.

        Args:
          name: of the tensor.
          out: an array of its shape with any strides, such as the transpose of a
            kernel, and any dtype to cast to.

        Raises:
          ValueError: if the shapes differ.
        """
        entry = self._entries[name]
        if out.shape != entry.shape:
            raise ValueError(
                f"read_into: {name!r} is {entry.shape}, the array is {out.shape}"
            )
        # Leading axes one by one, rows of the last two in chunks.
        width = entry.shape[-1]
        if out.size == 0:
            return
        row = width // entry.kind.values * entry.kind.size
        begin = entry.begin
        for index in np.ndindex(entry.shape[:-2]):
            part = out[index] if index else out
            part = part[None] if part.ndim == 1 else part
            step = max(1, _CHUNK // width)
            for first in range(0, len(part), step):
                rows = part[first : first + step]
                raw = self._bytes(begin, begin + len(rows) * row)
                rows[...] = _decode(entry.kind, raw).reshape(rows.shape)
                begin += len(rows) * row

    def _bytes(self, begin, end):
        if self._map is not None:
            return self._map[begin:end].view(np.ndarray)
        with self.path.open("rb") as f:
            f.seek(begin)
            return np.frombuffer(f.read(end - begin), np.uint8)


def _decode(kind, raw):
    if kind.decode is None:
        return raw.view(kind.dtype)
    return kind.decode(raw.reshape(-1, kind.size))
