"""Values to blocks, for writing: round to nearest, one scale per 32 values."""

import numpy as np

from mtl_jax.io.gguf import _blocks


def _half_bytes(x):
    return x.astype("<f2").view(np.uint8)


def _reciprocal(d):
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    # Of a subnormal scale: its values round to zero or to the end of the range.
    return np.where(np.isfinite(inverse), inverse, np.finfo(np.float32).max)


def _pack(q):
    """Sixteen values into low halves, the next sixteen into high halves."""
    return q[:, :16] | (q[:, 16:] << 4)


def _q8_0(x):
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scaled = x * _reciprocal(d)
    # To nearest, halves away from zero.
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    q = np.clip(q, -127, 127).astype(np.int8).view(np.uint8)
    return np.concatenate([_half_bytes(d), q], axis=1)


def _q4_0(x):
    at = np.abs(x).argmax(1)[:, None]
    d = np.take_along_axis(x, at, 1) / np.float32(-8)
    q = np.trunc(x * _reciprocal(d) + np.float32(8.5))
    q = np.clip(q, 0, 15).astype(np.uint8)
    return np.concatenate([_half_bytes(d), _pack(q)], axis=1)


def _q4_1(x):
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(15)
    q = np.trunc((x - low) * _reciprocal(d) + np.float32(0.5))
    q = np.clip(q, 0, 15).astype(np.uint8)
    return np.concatenate([_half_bytes(d), _half_bytes(low), _pack(q)], axis=1)


ENCODERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


def encode(kind: _blocks.BlockType, rows: np.ndarray) -> np.ndarray:
    """Bytes of some whole rows.

    Args:
      kind: a plain type or one of `ENCODERS`.
      rows: [..., K] with K a multiple of `kind.values`.

    Returns:
      [bytes] uint8.

    Raises:
      ValueError: for a quantised type, if a value is not finite or a scale of it
        leaves the range of float16.
    """
    if kind.decode is None:
        plain = np.ascontiguousarray(rows, kind.dtype)
        return plain.reshape(-1).view(np.uint8)
    blocks = np.asarray(rows, np.float32).reshape(-1, kind.values)
    if not np.isfinite(blocks).all():
        raise ValueError(f"a value is not finite, which {kind.name} cannot hold")
    with np.errstate(over="ignore"):
        raw = ENCODERS[kind.name](blocks)
    scales = raw[:, : 4 if kind.name == "Q4_1" else 2].copy().view("<f2")
    if not np.isfinite(scales).all():
        raise ValueError(f"values are too large for the float16 scales of {kind.name}")
    return raw.reshape(-1)
