"""The safetensors format: checked reading by memory map, streamed atomic writing.

A file is eight bytes (little-endian length of the header), a JSON header that maps
names to dtype, shape and byte range, and the raw little-endian tensors without gaps.
"""

import collections
import contextlib
import json
import math
import mmap
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_ALIGN = 8


class _Entry(NamedTuple):
    """Where a tensor lies: offsets count from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Pages:
    """Which pages of mapped files stay in memory; dropped ones can be read again.

    Args:
      limit: of the ranges in use, only the newest of so many bytes keep their pages,
        and always the very newest.
    """

    def __init__(self, limit: int):
        self._limit, self._total = limit, 0
        self._used: collections.deque[tuple[mmap.mmap, int, int]] = collections.deque()
        self._lock = threading.Lock()

    def use(self, mapped: mmap.mmap, begin: int, end: int) -> None:
        """Notes a range that is about to be read, and drops the oldest ones."""
        if not hasattr(mapped, "madvise"):  # The system does not offer it.
            return
        old = []
        with self._lock:
            self._used.append((mapped, begin, end))
            self._total += end - begin
            while self._total > self._limit and len(self._used) > 1:
                old.append(self._used.popleft())
                self._total -= old[-1][2] - old[-1][1]
        for file, first, last in old:
            first = first // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                file.madvise(mmap.MADV_DONTNEED, first, last - first)


class SafetensorsFile(Mapping[str, np.ndarray]):
    """Lazy read-only view of one file: opening checks the header, reading maps.

    Tensors of a local file are memory-mapped views, so nothing is copied until it is
    used; on other file systems (`gs://`) each access reads its own byte range.

    Args:
      path: a local path or anything `etils.epath` opens.
      pages: bounds how much of what was read stays in the memory of this process;
        several files can share one. Views stay valid. None: everything stays.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a well-formed safetensors file, naming the fault.
    """

    def __init__(self, path: epath.PathLike, *, pages: Pages | None = None):
        self.path = epath.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        size = self.path.stat().length
        with self.path.open("rb") as f:
            header = _read_header(f, size, self.path)
        self._start, raw = header
        self.metadata: dict[str, str] = _metadata(raw, self.path)
        self._entries = _entries(raw, size - self._start, self.path)
        local = os.path.exists(self.path)
        self._map = _mapped(self.path) if local else None
        self._pages = pages
        self._file: int | None = None
        if local and hasattr(os, "preadv"):
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        return self._read(entry.dtype, entry.begin, entry.end).reshape(entry.shape)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start to stop of a tensor in row-major order.

        Raises:
          ValueError: if the tensor has fewer entries.
        """
        entry = self._entries[name]
        size = math.prod(entry.shape)
        if not 0 <= start <= stop <= size:
            raise ValueError(
                f"{self.path}: {name!r} has {size} entries, wanted {start} to {stop}"
            )
        width = entry.dtype.itemsize
        return self._read(
            entry.dtype, entry.begin + start * width, entry.begin + stop * width
        )

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        """Copies entries from `start` on into an array; no page of the file is mapped.

        Args:
          name: of the tensor.
          start: index of the first entry, in row-major order.
          out: contiguous, of the tensor's dtype; as many entries as are wanted.

        Raises:
          ValueError: if the tensor has fewer entries, or the file has become shorter.
        """
        entry = self._entries[name]
        if self._file is None or not 0 <= start <= start + out.size <= math.prod(
            entry.shape
        ):
            out[...] = self.flat(name, start, start + out.size)
            return
        rest = memoryview(out.reshape(-1).view(np.uint8))
        place = self._start + entry.begin + start * entry.dtype.itemsize
        while rest:
            count = os.preadv(self._file, [rest], place)
            if not count:
                raise ValueError(f"{self.path}: {name!r} ends at byte {place}")
            rest, place = rest[count:], place + count

    def _read(self, dtype, begin, end):
        begin, count = self._start + begin, end - begin
        if self._map is not None:
            if self._pages is not None:
                self._pages.use(self._map, begin, begin + count)
            raw = np.frombuffer(self._map, np.uint8, count, begin)
        else:
            with self.path.open("rb") as f:
                f.seek(begin)
                raw = np.frombuffer(f.read(count), np.uint8)
        return raw.view(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        return self._entries[name].dtype

    def offset(self, name: str) -> int:
        """Byte of the data at which a tensor begins."""
        return self._entries[name].begin


def _mapped(path):
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(f, size, path):
    """Returns (offset of the data, header as a dict)."""
    if size < 8:
        raise ValueError(f"{path}: truncated, {size} bytes hold no header length")
    (length,) = struct.unpack("<Q", f.read(8))
    if length > _MAX_HEADER:
        raise ValueError(
            f"{path}: header length {length} is above the limit of {_MAX_HEADER}: "
            "not a safetensors file, or corrupt"
        )
    if 8 + length > size:
        raise ValueError(
            f"{path}: header of {length} bytes runs past the end of the file "
            f"({size} bytes): truncated or corrupt"
        )
    try:
        header = json.loads(f.read(length), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: header is not valid JSON: {error}") from error
    except _DuplicateKeyError as error:
        raise ValueError(f"{path}: header has {error} twice") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header must be a JSON object")
    return 8 + length, header


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs):
    out = {}
    for key, value in pairs:
        if key in out:
            raise _DuplicateKeyError(repr(key))
        out[key] = value
    return out


def _metadata(header, path):
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(v, str) for v in metadata.values()
    ):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    return metadata


def _entries(header, size, path):
    """Checks every tensor and that together they tile the data exactly."""
    entries = {name: _entry(name, raw, size, path) for name, raw in header.items()}
    end, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin < end:
            raise ValueError(
                f"{path}: {name!r} begins at byte {entry.begin} and overlaps {last}, "
                f"which ends at {end}"
            )
        if entry.begin > end:
            raise ValueError(
                f"{path}: {entry.begin - end} unused bytes between {last} and {name!r}"
            )
        end, last = entry.end, repr(name)
    if end != size:
        raise ValueError(f"{path}: {size - end} unused bytes after {last}")
    return entries


def _entry(name, raw, size, path):
    where = f"{path}: {name!r}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{where} has unknown dtype {dtype!r}, known: {', '.join(_DTYPES)}"
        )
    if not _naturals(shape):
        raise ValueError(f"{where} has an invalid shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has invalid data_offsets {offsets!r}")
    begin, end = offsets
    if end > size:
        raise ValueError(
            f"{where} ends at byte {end} of the data, of which the file has {size}: "
            "truncated or corrupt"
        )
    wanted = math.prod(shape) * _DTYPES[dtype].itemsize
    if wanted != end - begin:
        raise ValueError(
            f"{where} is {dtype}{shape}, {wanted} bytes, but its range has "
            f"{end - begin}"
        )
    return _Entry(_DTYPES[dtype], tuple(shape), begin, end)


def _naturals(value):
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def save(
    path: epath.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to one file, one at a time, and renames it into place.

    Args:
      path: the file; its directory must exist.
      tensors: name -> array (NumPy or JAX); each is brought to the host only while
        it is written. Shape and dtype are read beforehand.
      metadata: strings to strings.

    Raises:
      ValueError: for a dtype that the format lacks, or metadata that is not strings.
      OSError: if the file cannot be written; nothing is left behind then.
    """
    path = epath.Path(path)
    raw = header(tensors, metadata or {})
    with _replacing(path) as f:
        f.write(raw)
        for name in order(tensors):
            array = np.asarray(tensors[name])
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            f.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


def order(tensors: Mapping[str, Any]) -> list[str]:
    """Widest dtype first, then by name: every tensor is aligned to its item size."""
    return sorted(tensors, key=lambda n: (-np.dtype(tensors[n].dtype).itemsize, n))


def header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with: the length of the header, and the header.

    Args:
      tensors: name -> anything with a shape and a dtype; they follow in the order of
        `order`, without gaps.
      metadata: strings to strings.

    Raises:
      ValueError: for a dtype that the format lacks, or metadata that is not strings.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"safetensors.save: metadata must map strings to strings, found "
                f"{key!r}: {value!r}"
            )
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order(tensors):
        if name == "__metadata__":
            raise ValueError("safetensors.save: '__metadata__' is a reserved name")
        dtype = np.dtype(tensors[name].dtype).newbyteorder("<")
        if dtype not in _NAMES:
            raise ValueError(
                f"safetensors.save: {name!r} has dtype {dtype}, which the format "
                f"lacks; known: {', '.join(_DTYPES)}"
            )
        shape = tuple(tensors[name].shape)
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGN)
    return struct.pack("<Q", len(raw)) + raw


@contextlib.contextmanager
def _replacing(path: epath.Path):
    """Opens a temporary sibling that becomes `path` only on success."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("wb") as f:
            yield f
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
