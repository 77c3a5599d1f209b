"""Vectorised decoders against scalar ones that walk each block byte by byte."""

import struct

import numpy as np
import pytest

from mtl_jax.io.gguf import _blocks

pytestmark = pytest.mark.fast


def half(block, begin):
    return np.float32(struct.unpack_from("<e", block, begin)[0])


def f32(x):
    return np.float32(x)


def q8_0(b):
    d = half(b, 0)
    return [d * f32(struct.unpack_from("b", b, 2 + i)[0]) for i in range(32)]


def four_bits(b, begin):
    """Value i < 16 is the low half of byte i, value 16 + i its high half."""
    return [b[begin + i % 16] >> 4 * (i // 16) & 15 for i in range(32)]


def five_bits(b, word, begin):
    (bits,) = struct.unpack_from("<I", b, word)
    low = four_bits(b, begin)
    return [low[i] + 16 * (bits >> i & 1) for i in range(32)]


def q4_0(b):
    return [half(b, 0) * f32(q - 8) for q in four_bits(b, 2)]


def q4_1(b):
    return [half(b, 0) * f32(q) + half(b, 2) for q in four_bits(b, 4)]


def q5_0(b):
    return [half(b, 0) * f32(q - 16) for q in five_bits(b, 2, 6)]


def q5_1(b):
    return [half(b, 0) * f32(q) + half(b, 2) for q in five_bits(b, 4, 8)]


def q2_k(b):
    d, d_min, out = half(b, 80), half(b, 82), []
    for i in range(256):
        scale = b[i // 16]
        byte = b[16 + i // 128 * 32 + i % 32]
        q = byte >> 2 * (i % 128 // 32) & 3
        out.append(d * f32(scale & 15) * f32(q) - d_min * f32(scale >> 4))
    return out


def q3_k(b):
    d, out = half(b, 108), []
    for i in range(256):
        group = i // 16
        low = b[96 + group % 8] >> 4 * (group // 8) & 15
        top = b[104 + group % 4] >> 2 * (group // 4) & 3
        q = b[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        kept = b[i % 32] >> (i // 32) & 1
        out.append(d * f32(low + 16 * top - 32) * f32(q - (0 if kept else 4)))
    return out


def six_bits(b, begin, group):
    """Scale and minimum of one of eight groups."""
    s = b[begin : begin + 12]
    if group < 4:
        return s[group] & 63, s[group + 4] & 63
    g = group - 4
    return (
        s[g + 8] & 15 | s[g] >> 6 << 4,
        s[g + 8] >> 4 | s[g + 4] >> 6 << 4,
    )


def q4_k(b, fifth=lambda b, i: 0, begin=16):
    d, d_min, out = half(b, 0), half(b, 2), []
    for i in range(256):
        scale, minimum = six_bits(b, 4, i // 32)
        byte = b[begin + i // 64 * 32 + i % 32]
        q = (byte >> 4 * (i % 64 // 32) & 15) + 16 * fifth(b, i)
        out.append(d * f32(scale) * f32(q) - d_min * f32(minimum))
    return out


def q5_k(b):
    return q4_k(b, lambda b, i: b[16 + i % 32] >> (i // 32) & 1, 48)


def q6_k(b):
    d, out = half(b, 208), []
    for i in range(256):
        part, j = i // 128, i % 128
        low = b[part * 64 + j % 64] >> 4 * (j // 64) & 15
        high = b[128 + part * 32 + j % 32] >> 2 * (j // 32) & 3
        (scale,) = struct.unpack_from("b", b, 192 + i // 16)
        out.append(d * f32(scale) * f32(low + 16 * high - 32))
    return out


SCALAR = {
    name: globals()[name.lower()]
    for name, kind in _blocks.TYPES.items()
    if kind.decode is not None
}
# Where the float16 scales of a block are.
HALVES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}


def random_blocks(kind, count, seed=0):
    """Random bytes with finite scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, kind.size)).astype(np.uint8)
    for begin in HALVES.get(kind.name, (0,)):
        scales = rng.normal(size=(count, 1)).astype("<f2")
        blocks[:, begin : begin + 2] = scales.view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", SCALAR)
def test_decoders_agree_bit_by_bit_with_scalar_ones(name):
    kind = _blocks.TYPES[name]
    blocks = random_blocks(kind, 5)
    got = kind.decode(blocks)
    assert (got.dtype, got.shape) == (np.float32, (5, kind.values))
    want = np.array([SCALAR[name](bytes(block)) for block in blocks])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", SCALAR)
def test_every_bit_of_a_block_has_a_meaning(name):
    """Flipping any bit changes some value, so that no field is left unread."""
    kind = _blocks.TYPES[name]
    block = random_blocks(kind, 1, seed=1)[0]
    flipped = np.tile(block, (8 * kind.size, 1))
    for bit in range(8 * kind.size):
        flipped[bit, bit // 8] ^= 1 << bit % 8
    with np.errstate(all="ignore"):
        same = (kind.decode(flipped) == kind.decode(block[None])).all(1)
    assert not same.any()


def test_codes_and_names_are_unique():
    assert len(_blocks.CODES) == len(_blocks.TYPES)
    assert not set(_blocks.CODES) & set(_blocks.OTHER)


@pytest.mark.reference
@pytest.mark.parametrize("name", _blocks.TYPES)
def test_decoders_agree_with_the_gguf_package(name):
    library = pytest.importorskip("gguf")
    kind, code = _blocks.TYPES[name], library.GGMLQuantizationType[name]
    assert (kind.code, kind.values, kind.size) == (
        int(code),
        *library.GGML_QUANT_SIZES[code],
    )
    if kind.decode is None:
        return
    blocks = random_blocks(kind, 40)
    want = library.quants.dequantize(blocks, code)
    np.testing.assert_array_equal(kind.decode(blocks), want.reshape(40, -1))
