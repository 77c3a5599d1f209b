"""Counts beyond 32 bits in two words: 64-bit integers are off by default in JAX."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SPAN = 0xFFFFFFFF
_HALF, _MASK = 16, 0xFFFF


class Wide(NamedTuple):
    """A whole number below 2^48, `high * 2^16 + low`.

    Attributes:
      high: uint32 of any shape.
      low: uint32 of the same shape, below 2^16.
    """

    high: jax.Array
    low: jax.Array


def wide(value: Any) -> Wide:
    """A Python int below 2^48, or an array of 32-bit integers of 0 and more."""
    if isinstance(value, int):
        return Wide(jnp.uint32(value >> _HALF), jnp.uint32(value & _MASK))
    value = value.astype(jnp.uint32)
    return Wide(value >> _HALF, value & jnp.uint32(_MASK))


def narrow(x: Wide) -> jax.Array:
    """uint32; all ones where the number does not fit."""
    value = (x.high << _HALF) | x.low
    return jnp.where(x.high > _MASK, jnp.uint32(0xFFFFFFFF), value)


def add(x: Wide, y: Wide) -> Wide:
    """Their sum."""
    return _carry(x.high + y.high, x.low + y.low)


def subtract(x: Wide, y: Wide) -> Wide:
    """Their difference; `y` is not the larger."""
    borrow = (x.low < y.low).astype(jnp.uint32)
    return Wide(x.high - y.high - borrow, x.low + (borrow << _HALF) - y.low)


def less(x: Wide, y: Wide) -> jax.Array:
    """Whether `x` is the smaller."""
    return (x.high < y.high) | ((x.high == y.high) & (x.low < y.low))


def positive(x: Wide) -> jax.Array:
    """Whether it is not zero."""
    return (x.high > 0) | (x.low > 0)


def minimum(x: Wide, y: Wide) -> Wide:
    """The smaller."""
    return jax.tree.map(lambda a, b: jnp.where(less(x, y), a, b), x, y)


def _carry(high: jax.Array, low: jax.Array) -> Wide:
    return Wide(high + (low >> _HALF), low & jnp.uint32(_MASK))


def split(
    shape: Sequence[int], axes: Sequence[int], *, span: int | None = None
) -> tuple[list[int], list[int]]:
    """Divides ascending axes in two, so that 32 bits count the entries of the second.

    Args:
      shape: of an array.
      axes: some of its axes.
      span: how many entries the second part may have; 2^32 - 1 by default.

    Raises:
      ValueError: the last axis alone has more than 2^32 - 1 entries, or the first part
        more than 2^16.
    """
    axes, span = list(axes), SPAN if span is None else span
    inner = len(axes)
    while inner and math.prod(shape[a] for a in axes[inner - 1 :]) <= span:
        inner -= 1
    outer = math.prod(shape[a] for a in axes[:inner])
    if axes and (inner == len(axes) or outer > _MASK):
        raise ValueError(
            f"order statistics: {tuple(shape)} has too many entries in its last axis, "
            "or blocks before it, for 32 bits; reshape it"
        )
    return axes[:inner], axes[inner:]


def count(keep: jax.Array, axes: Sequence[int], *, keepdims: bool = False) -> Wide:
    """How many are True along the last axes `axes`, however many there are."""
    outer, inner = split(keep.shape, axes)
    part = jnp.sum(keep, axis=tuple(inner), dtype=jnp.uint32, keepdims=True)
    high, low = (
        jnp.sum(word, axis=tuple(outer), dtype=jnp.uint32, keepdims=True)
        for word in wide(part)
    )
    found = _carry(high, low)
    if keepdims:
        return found
    return jax.tree.map(lambda word: jnp.squeeze(word, tuple(axes)), found)
