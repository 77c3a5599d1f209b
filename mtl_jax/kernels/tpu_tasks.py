"""Task trees as operands of Pallas TPU kernels: what shares a launch, and blocks.

An array lies in memory in tiles of its last two axes, so a leaf [T, ..., a, b] is taken
as [T, rows, b]: leading axes merge without moving data where `a` fills whole tiles.
Where it does not, XLA copies the leaf first, as it does for a flat view of any leaf.
Only leaves whose last axis does not fill the 128 lanes are flattened.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

MAX_TASKS = 128
LANES = 128
ROWS = 16  # a multiple of the sublanes of every dtype taken
DTYPES = (jnp.float32, jnp.bfloat16)

_ALONE = 1 << 15  # entries per task from which a leaf is worth a launch of its own
_PACK = 1 << 20  # entries per task that packed leaves hold together
_BLOCK = 1 << 19  # entries of all tasks in one block: 2 MiB of float32
_MAX_LANES = 1024


def check(name: str, leaves: Sequence[chex.Array]) -> None:
    """Refuses leaves that no kernel takes.

    Raises:
      ValueError: naming the operation.
    """
    for x in leaves:
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: implementation 'pallas_tpu' takes float32 and bfloat16, "
                f"found {x.dtype}"
            )
        if x.shape[0] > MAX_TASKS:
            raise ValueError(
                f"{name}: implementation 'pallas_tpu' takes at most {MAX_TASKS} tasks, "
                f"found {x.shape[0]}"
            )


def plan(leaves: Sequence[chex.Array]) -> list[tuple[int, ...]]:
    """Numbers of the leaves of each launch; leaves without entries are in none.

    A large leaf is read where it lies. Small ones of one dtype are copied together, up
    to a bound: that copy is small, and saves launches that take longer than their work.
    """
    alone, packs, filled = [], {}, {}
    for i, x in enumerate(leaves):
        size = math.prod(x.shape[1:])
        if size >= _ALONE:
            alone.append((i,))
        elif size:
            begun = packs.setdefault(x.dtype, [[]])
            if filled.get(x.dtype, 0) + size > _PACK:
                begun.append([])
                filled[x.dtype] = 0
            begun[-1].append(i)
            filled[x.dtype] = filled.get(x.dtype, 0) + size
    return alone + [tuple(pack) for begun in packs.values() for pack in begun]


def operand(leaves: Sequence[chex.Array]) -> chex.Array:
    """The leaves of one launch as [T, rows, lanes] or [T, n]."""
    tasks = leaves[0].shape[0]
    if len(leaves) > 1:
        return jnp.concatenate([x.reshape(tasks, -1) for x in leaves], axis=1)
    (x,) = leaves
    wide = x.ndim >= 3 and x.shape[-1] >= LANES
    return x.reshape(tasks, -1, x.shape[-1]) if wide else x.reshape(tasks, -1)


def restore(out: chex.Array, shapes: Sequence[tuple[int, ...]]) -> list[chex.Array]:
    """Undoes `operand` for results that lead with another axis: [M, *shape] each."""
    rows = out.shape[0]
    if len(shapes) == 1:
        return [out.reshape(rows, *shapes[0])]
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    parts = jnp.split(out, ends[:-1], axis=1)
    return [x.reshape(rows, *s) for x, s in zip(parts, shapes, strict=True)]


def _up(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def block(shape: tuple[int, ...], planes: int) -> tuple[int, ...]:
    """Block [rows, lanes] or [lanes] of an operand of that shape.

    Args:
      shape: [T, rows, lanes] or [T, n].
      planes: how many rows of entries a block holds for each entry of one task.

    Returns:
      Whole tiles; it may reach beyond the operand.
    """
    if len(shape) == 2:
        entries = max(_BLOCK // _up(planes, ROWS), _MAX_LANES)
        if shape[1] <= entries:
            unit = LANES if shape[1] <= _MAX_LANES else _MAX_LANES
            return (_up(shape[1], unit),)
        return (entries // _MAX_LANES * _MAX_LANES,)
    entries = max(_BLOCK // planes, ROWS * LANES)
    most = max(min(_MAX_LANES, entries // ROWS) // LANES, 1) * LANES
    lanes = min(_up(shape[2], LANES), most)
    rows = min(_up(shape[1], ROWS), max(entries // lanes // ROWS, 1) * ROWS)
    return rows, lanes


def mask(x: chex.Array, starts: Sequence[Any], limits: Sequence[int]) -> chex.Array:
    """Zeros where a block reaches beyond its operand; the last axes of `x` count."""
    first = x.ndim - len(limits)
    keep = None
    for axis, (start, limit) in enumerate(zip(starts, limits, strict=True), first):
        inside = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < limit
        keep = inside if keep is None else keep & inside
    return jnp.where(keep, x, jnp.zeros((), x.dtype))
