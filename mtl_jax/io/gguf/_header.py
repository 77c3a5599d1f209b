"""The header of a GGUF file: counted, bounded and checked before it is believed."""

import math
import struct
from typing import IO, Any, NamedTuple

import numpy as np

from mtl_jax.io.gguf import _blocks

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MAX_ALIGNMENT = 1 << 16
_MAX_AXES = 4
_MAX_NESTING = 4
# The shortest metadata entry (empty key, type, one byte) and tensor entry.
_MIN_FIELD, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


class Entry(NamedTuple):
    """Where a tensor lies: offsets count from the begin of the file."""

    kind: _blocks.BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """All that precedes the tensors."""

    version: int
    metadata: dict[str, Any]
    entries: dict[str, Entry]


class _Cursor:
    """Reads forward; refuses to read, or to be told to make, more than there is."""

    def __init__(self, file: IO[bytes], size: int, path: Any):
        self._file, self._size, self._path, self.at = file, size, path, 0

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self._path}: {message}")

    def bytes(self, count: int, what: str) -> bytes:
        if count > self._size - self.at:
            raise self.fail(
                f"{what} needs {count} bytes at byte {self.at}, of which the file has "
                f"{self._size - self.at}: truncated or corrupt"
            )
        raw = self._file.read(count)
        if len(raw) != count:
            raise self.fail(f"{what} ends early at byte {self.at + len(raw)}")
        self.at += count
        return raw

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.bytes(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.bytes(8, what))[0]

    def count(self, what: str, each: int) -> int:
        """A number of things that take at least `each` bytes of what is left."""
        number = self.u64(f"the number of {what}")
        if number * each > self._size - self.at:
            raise self.fail(
                f"claims {number} {what} of {each} bytes or more, of which the file "
                f"has {self._size - self.at} left: truncated or corrupt"
            )
        return number

    def string(self, what: str) -> str:
        raw = self.bytes(self.u64(f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from error


def read(file: IO[bytes], size: int, path: Any) -> Header:
    """Parses and checks the header.

    Args:
      file: open at its begin.
      size: length of the whole file in bytes.
      path: what an error begins with.

    Raises:
      ValueError: naming the fault.
    """
    cursor = _Cursor(file, size, path)
    version = _version(cursor)
    num_tensors = cursor.count("tensors", _MIN_TENSOR)
    num_fields = cursor.count("metadata entries", _MIN_FIELD)
    metadata: dict[str, Any] = {}
    for i in range(num_fields):
        key = cursor.string(f"the key of metadata entry {i}")
        if key in metadata:
            raise cursor.fail(f"metadata has {key!r} twice")
        kind = cursor.u32(f"the type of metadata {key!r}")
        metadata[key] = _value(cursor, kind, f"metadata {key!r}", 0)
    alignment = _alignment(cursor, metadata)
    raw: dict[str, tuple] = {}
    for i in range(num_tensors):
        name, entry = _tensor(cursor, i)
        if name in raw:
            raise cursor.fail(f"tensor {name!r} is there twice")
        raw[name] = entry
    start = -(-cursor.at // alignment) * alignment
    entries = {
        name: _placed(cursor, name, entry, start, size, alignment)
        for name, entry in raw.items()
    }
    _refuse_overlaps(cursor, entries)
    return Header(version, metadata, entries)


def _version(cursor):
    magic = cursor.bytes(4, "the magic number")
    if magic != MAGIC:
        raise cursor.fail(f"begins with {magic!r}, not with {MAGIC!r}: not a GGUF file")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise cursor.fail("is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise cursor.fail(f"has GGUF version {version}; versions 2 and 3 are read")
    return version


def _value(cursor, kind, what, depth):
    if kind == STRING:
        return cursor.string(what)
    if kind == ARRAY:
        return _array(cursor, what, depth)
    if kind not in SCALARS:
        raise cursor.fail(f"{what} has unknown type {kind}")
    dtype = SCALARS[kind]
    value = np.frombuffer(cursor.bytes(dtype.itemsize, what), dtype)
    if kind == BOOL:
        return bool(_booleans(cursor, value, what)[0])
    return value[0].item()


def _array(cursor, what, depth):
    """Numbers as one NumPy array, everything else as a list."""
    if depth == _MAX_NESTING:
        raise cursor.fail(f"{what} nests arrays more than {_MAX_NESTING} deep")
    kind = cursor.u32(f"the element type of {what}")
    if kind in SCALARS:
        dtype = SCALARS[kind]
        number = cursor.count(f"elements of {what}", dtype.itemsize)
        values = np.frombuffer(cursor.bytes(number * dtype.itemsize, what), dtype)
        return _booleans(cursor, values, what) if kind == BOOL else values
    if kind not in (STRING, ARRAY):
        raise cursor.fail(f"{what} has unknown element type {kind}")
    number = cursor.count(f"elements of {what}", 8 if kind == STRING else 12)
    return [
        _value(cursor, kind, f"element {i} of {what}", depth + 1) for i in range(number)
    ]


def _booleans(cursor, values, what):
    if values.size and values.max() > 1:
        raise cursor.fail(f"{what} has a boolean of {values.max()}")
    return values.astype(np.bool_)


def _alignment(cursor, metadata):
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 8 <= alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.fail(
            f"{ALIGNMENT_KEY} is {alignment!r}, wanted a power of two from 8 to "
            f"{_MAX_ALIGNMENT}"
        )
    return alignment


def _tensor(cursor, number):
    """Returns (name, (type code, shape, offset)); the first axis is the slowest."""
    name = cursor.string(f"the name of tensor {number}")
    axes = cursor.u32(f"the number of axes of {name!r}")
    if not 1 <= axes <= _MAX_AXES:
        raise cursor.fail(f"{name!r} has {axes} axes, wanted 1 to {_MAX_AXES}")
    raw = cursor.bytes(8 * axes, f"the shape of {name!r}")
    shape = struct.unpack(f"<{axes}Q", raw)[::-1]
    code = cursor.u32(f"the type of {name!r}")
    return name, (code, shape, cursor.u64(f"the offset of {name!r}"))


def _placed(cursor, name, entry, start, size, alignment):
    code, shape, offset = entry
    if code not in _blocks.CODES:
        known = ", ".join(_blocks.TYPES)
        label = f" ({_blocks.OTHER[code]})" if code in _blocks.OTHER else ""
        raise cursor.fail(
            f"{name!r} has tensor type {code}{label}, which is not read; known: {known}"
        )
    kind = _blocks.CODES[code]
    if shape[-1] % kind.values:
        raise cursor.fail(
            f"{name!r} is {kind.name}, whose rows are multiples of {kind.values}, but "
            f"has shape {shape}"
        )
    if offset % alignment:
        raise cursor.fail(
            f"{name!r} has offset {offset}, which is no multiple of the alignment "
            f"{alignment}"
        )
    begin = start + offset
    end = begin + math.prod(shape) // kind.values * kind.size
    if end > size:
        raise cursor.fail(
            f"{name!r} is {kind.name} of shape {shape} and would end at byte {end}, "
            f"but the file has {size}: truncated or corrupt"
        )
    return Entry(kind, shape, begin, end)


def _refuse_overlaps(cursor, entries):
    end, last = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin < end:
            raise cursor.fail(
                f"{name!r} begins at byte {entry.begin} and overlaps {last!r}, which "
                f"ends at {end}"
            )
        if entry.end > entry.begin:
            end, last = entry.end, name
