"""Element types of GGUF tensors, and what the bytes of their blocks mean.

A quantised row is a sequence of blocks of 32 or 256 values. The decoders take blocks
as bytes [N, bytes per block] and give float32 [N, values per block], in the order of
operations of the format's reference implementation, so that results agree bit by bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

Decoder = Callable[[np.ndarray], np.ndarray]


class BlockType(NamedTuple):
    """One element type.

    Attributes:
      name: as it is written, e.g. "Q4_1".
      code: its number in the file.
      values: values per block; 1 for plain types.
      size: bytes per block.
      dtype: of the decoded values.
      decode: bytes [N, size] -> float32 [N, values]; None for plain types, whose
        bytes are the values.
    """

    name: str
    code: int
    values: int
    size: int
    dtype: np.dtype
    decode: Decoder | None = None


def _half(blocks, begin):
    """The float16 at a byte of each block, as float32 [N, 1]."""
    raw = np.ascontiguousarray(blocks[:, begin : begin + 2])
    return raw.view("<f2").astype(np.float32)


def _nibbles(qs):
    """Low halves of all bytes, then high halves: [N, B] -> [N, 2 B]."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(blocks, begin):
    """32 bits of a little-endian word as 0 or 16: [N, 32] uint8."""
    bits = np.unpackbits(blocks[:, begin : begin + 4], axis=1, bitorder="little")
    return bits << 4


def _signed(q, offset):
    return q.astype(np.int8) - np.int8(offset)


def _q8_0(blocks):
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _q4_0(blocks):
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks):
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks):
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * _signed(q, 16)


def _q5_1(blocks):
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * q + _half(blocks, 2)


def _planes(packed, width, bits):
    """Bit fields of `width` bytes at a time: the lowest fields of all bytes first.

    [N, B] uint8 -> [N, B / width * 8 / bits, width].
    """
    count = len(packed)
    grouped = packed.reshape(count, -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (grouped >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(count, -1, width)


def _scaled(scale, q, minimum=None):
    """Scale [N, G] times q [N, 256] - minimum [N, G], per group of 256 / G values."""
    count, groups = scale.shape
    out = scale[:, :, None] * q.reshape(count, groups, -1)
    if minimum is not None:
        out -= minimum[:, :, None]
    return out.reshape(count, -1)


def _q2_k(blocks):
    scales = blocks[:, :16]
    q = _planes(blocks[:, 16:80], 32, 2)
    d, d_min = _half(blocks, 80), _half(blocks, 82)
    return _scaled(d * (scales & 15), q, d_min * (scales >> 4))


def _q3_k(blocks):
    high = _planes(blocks[:, :32], 32, 1)
    q = _signed(_planes(blocks[:, 32:96], 32, 2) | (high << 2), 4)
    low = _nibbles(blocks[:, 96:104])
    top = _planes(blocks[:, 104:108], 4, 2).reshape(len(blocks), -1)
    scales = _signed(low | (top << 4), 32)
    return _scaled(_half(blocks, 108) * scales, q)


def _six_bits(packed):
    """12 bytes -> eight 6-bit scales and eight 6-bit minima."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, minima


def _q4_k(blocks):
    d, d_min = _half(blocks, 0), _half(blocks, 2)
    scales, minima = _six_bits(blocks[:, 4:16])
    return _scaled(d * scales, _planes(blocks[:, 16:], 32, 4), d_min * minima)


def _q5_k(blocks):
    d, d_min = _half(blocks, 0), _half(blocks, 2)
    scales, minima = _six_bits(blocks[:, 4:16])
    high = _planes(blocks[:, 16:48], 32, 1)
    q = _planes(blocks[:, 48:], 32, 4) | (high << 4)
    return _scaled(d * scales, q, d_min * minima)


def _q6_k(blocks):
    low = _planes(blocks[:, :128], 64, 4).reshape(len(blocks), -1)
    high = _planes(blocks[:, 128:192], 32, 2).reshape(len(blocks), -1)
    scales = blocks[:, 192:208].view(np.int8)
    return _scaled(_half(blocks, 208) * scales, _signed(low | (high << 4), 32))


_F32 = np.dtype("<f4")
_ALL = (
    BlockType("F32", 0, 1, 4, _F32),
    BlockType("F16", 1, 1, 2, np.dtype("<f2")),
    BlockType("Q4_0", 2, 32, 18, _F32, _q4_0),
    BlockType("Q4_1", 3, 32, 20, _F32, _q4_1),
    BlockType("Q5_0", 6, 32, 22, _F32, _q5_0),
    BlockType("Q5_1", 7, 32, 24, _F32, _q5_1),
    BlockType("Q8_0", 8, 32, 34, _F32, _q8_0),
    BlockType("Q2_K", 10, 256, 84, _F32, _q2_k),
    BlockType("Q3_K", 11, 256, 110, _F32, _q3_k),
    BlockType("Q4_K", 12, 256, 144, _F32, _q4_k),
    BlockType("Q5_K", 13, 256, 176, _F32, _q5_k),
    BlockType("Q6_K", 14, 256, 210, _F32, _q6_k),
    BlockType("I8", 24, 1, 1, np.dtype(np.int8)),
    BlockType("I16", 25, 1, 2, np.dtype("<i2")),
    BlockType("I32", 26, 1, 4, np.dtype("<i4")),
    BlockType("I64", 27, 1, 8, np.dtype("<i8")),
    BlockType("F64", 28, 1, 8, np.dtype("<f8")),
    BlockType("BF16", 30, 1, 2, np.dtype(ml_dtypes.bfloat16)),
)
TYPES = {kind.name: kind for kind in _ALL}
CODES = {kind.code: kind for kind in _ALL}
# Types of the format that this reader leaves out: named in the refusal.
OTHER = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
