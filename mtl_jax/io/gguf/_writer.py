"""Writing GGUF files: tensors one at a time, a few rows of each at a time."""

import math
import struct
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from mtl_jax.io import safetensors
from mtl_jax.io.gguf import _blocks, _header, _quantize

_CHUNK = 1 << 18
_VERSION = 3
_CODES = {
    dtype: code for code, dtype in _header.SCALARS.items() if code != _header.BOOL
} | {np.dtype(np.bool_): _header.BOOL}


def save(
    path: epath.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    types: Mapping[str, str] | None = None,
) -> None:
    """Writes a little-endian GGUF file of version 3 and renames it into place.

    Args:
      path: the file; its directory must exist.
      tensors: name -> array (NumPy, JAX or `HostLeaf`), axes in NumPy's order; each
        is brought to the host only while it is written.
      metadata: key -> string, boolean, number, NumPy scalar or array, or a list of
        strings or of one kind of numbers. Plain integers become uint32 where they
        fit, else int32, uint64 or int64; plain floats float32. A value of
        `general.alignment` is obeyed.
      types: tensor name -> "F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64",
        "Q8_0", "Q4_0" or "Q4_1". By default each array keeps its dtype.

    Raises:
      ValueError: naming the tensor or key that the format cannot hold.
      OSError: if the file cannot be written; nothing is left behind then.
    """
    path = epath.Path(path)
    metadata, types = dict(metadata or {}), dict(types or {})
    if unknown := sorted(set(types) - set(tensors)):
        raise ValueError(f"gguf.save: types names {unknown[0]!r}, no such tensor")
    kinds = {name: _kind(name, tensors[name], types.get(name)) for name in tensors}
    alignment = metadata.get(_header.ALIGNMENT_KEY, _header.DEFAULT_ALIGNMENT)
    head = _head(tensors, metadata, kinds, alignment)
    with safetensors._replacing(path) as f:
        f.write(head + bytes(-len(head) % alignment))
        for name, kind in kinds.items():
            size = _write(f, name, kind, np.asarray(tensors[name]))
            f.write(bytes(-size % alignment))


def _kind(name, array, wanted):
    if wanted is None:
        dtype = np.dtype(array.dtype).newbyteorder("<")
        for kind in _blocks.TYPES.values():
            if kind.decode is None and kind.dtype == dtype:
                wanted = kind.name
        if wanted is None:
            raise ValueError(f"gguf.save: {name!r} is {dtype}, which the format lacks")
    writable = [
        kind.name
        for kind in _blocks.TYPES.values()
        if kind.decode is None or kind.name in _quantize.ENCODERS
    ]
    if wanted not in writable:
        raise ValueError(
            f"gguf.save: {name!r} as {wanted!r} is not written, only "
            f"{', '.join(writable)}"
        )
    kind, shape = _blocks.TYPES[wanted], tuple(array.shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"gguf.save: {name!r} is {shape}, wanted 1 to 4 axes")
    if shape[-1] % kind.values:
        raise ValueError(
            f"gguf.save: {name!r} is {shape}, but rows of {wanted} are multiples of "
            f"{kind.values}"
        )
    return kind


def _head(tensors, metadata, kinds, alignment):
    if (
        not isinstance(alignment, int)
        or not 8 <= alignment <= 1 << 16
        or alignment & (alignment - 1)
    ):
        raise ValueError(
            f"gguf.save: {_header.ALIGNMENT_KEY} is {alignment!r}, wanted a power of "
            "two from 8 to 65536"
        )
    parts = [_header.MAGIC, struct.pack("<IQQ", _VERSION, len(kinds), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _field(key, value)]
    offset = 0
    for name, kind in kinds.items():
        shape = tuple(tensors[name].shape)
        axes = len(shape)
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{axes}Q", axes, *shape[::-1]))
        parts.append(struct.pack("<IQ", kind.code, offset))
        size = math.prod(shape) // kind.values * kind.size
        offset += -(-size // alignment) * alignment
    return b"".join(parts)


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(key, value):
    """Type and value."""
    if isinstance(value, str):
        return struct.pack("<I", _header.STRING) + _string(value)
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1:
        return struct.pack("<I", _header.ARRAY) + _elements(key, value)
    array = _numbers(key, value)
    if array.ndim:
        raise ValueError(
            f"gguf.save: metadata {key!r} has {array.ndim} axes, wanted 1 at most"
        )
    return struct.pack("<I", _CODES[array.dtype]) + array.tobytes()


def _elements(key, value):
    """Element type, count and elements."""
    if len(value) and all(isinstance(v, str) for v in value):
        head = struct.pack("<IQ", _header.STRING, len(value))
        return head + b"".join(map(_string, value))
    array = _numbers(key, value)
    return struct.pack("<IQ", _CODES[array.dtype], len(array)) + array.tobytes()


def _numbers(key, value):
    """Numbers as an array of a type that the format has."""
    array = np.asarray(value)
    plain = not isinstance(value, np.ndarray | np.generic)
    if plain and array.dtype.kind == "f":
        array = array.astype("<f4")
    elif plain and array.dtype.kind in "iu" and array.size:
        fits = [
            dtype
            for dtype in map(np.dtype, ("<u4", "<i4", "<u8", "<i8"))
            if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max
        ]
        array = array.astype(fits[0])
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in _CODES:
        raise ValueError(
            f"gguf.save: metadata {key!r} is {type(value).__name__} of {array.dtype}, "
            "which the format lacks"
        )
    return array


def _write(f: IO[bytes], name, kind, array):
    """Returns the number of bytes written."""
    rows = array.reshape(-1, array.shape[-1]) if array.size else array[:0]
    step, size = max(1, _CHUNK // max(1, array.shape[-1])), 0
    for first in range(0, len(rows), step):
        try:
            raw = _quantize.encode(kind, rows[first : first + step])
        except ValueError as error:
            raise ValueError(f"gguf.save: {name!r}: {error}") from error
        f.write(raw.data)
        size += raw.size
    return size
