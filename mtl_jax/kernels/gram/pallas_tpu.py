"""`gram` for TPU: every task's entries are read once, the [T, T] sums stay in VMEM.

Two ways to the same sums. Few tasks leave the matrix unit idle, since their [T, n] is
far narrower than it is: there each pair of tasks is multiplied entry by entry and added
into 1,024 partial sums that fill one register. More tasks go through the matrix unit,
row of lanes by row of lanes.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mtl_jax.kernels import tpu_tasks
from mtl_jax.kernels.tpu_tasks import LANES, ROWS

_MAX_PAIRED = 16  # tasks up to which pairs are multiplied entry by entry
_SUBLANES = 8
_LANE_STEP = 1024


def _product(x: chex.Array) -> chex.Array:
    """[T, lanes] -> [T, T]; products of bfloat16 are exact in float32 as they are."""
    dims = (((1,), (1,)), ((), ()))
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, x, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _start(out_ref, ids):
    first = functools.reduce(jnp.logical_and, [i == 0 for i in ids])

    @pl.when(first)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)


def _pairs_kernel(x_ref, out_ref, *, limits):
    tasks, rows, lanes = x_ref.shape
    ids = pl.program_id(0), pl.program_id(1)
    ragged = limits[0] % rows or limits[1] % lanes
    across = lanes // LANES
    _start(out_ref, ids)

    def chunk(index, sums):
        row = pl.multiple_of(jax.lax.div(index, across) * ROWS, ROWS)
        lane = pl.multiple_of(jax.lax.rem(index, across) * LANES, LANES)
        x = x_ref[:, pl.ds(row, ROWS), pl.ds(lane, LANES)].astype(jnp.float32)
        if ragged:
            x = tpu_tasks.mask(x, (ids[0] * rows + row, ids[1] * lanes + lane), limits)
        out = []
        for t, total in enumerate(sums):
            both = x[t : t + 1] * x[t:]
            out.append(total + (both[:, :_SUBLANES] + both[:, _SUBLANES:]))
        return tuple(out)

    zeros = [
        jnp.zeros((tasks - t, _SUBLANES, LANES), jnp.float32) for t in range(tasks)
    ]
    sums = jax.lax.fori_loop(0, rows // ROWS * across, chunk, tuple(zeros))
    for t, total in enumerate(sums):
        out_ref[t, t:, :, :] += total


def _rows_kernel(x_ref, out_ref, *, limits):
    _, rows, lanes = x_ref.shape
    ids = pl.program_id(0), pl.program_id(1)
    ragged = limits[0] % rows or limits[1] % lanes
    _start(out_ref, ids)

    def group(index, total):
        row = pl.multiple_of(index * ROWS, ROWS)
        x = x_ref[:, pl.ds(row, ROWS), :].astype(jnp.float32)
        if ragged:
            x = tpu_tasks.mask(x, (ids[0] * rows + row, ids[1] * lanes), limits)
        x = jnp.swapaxes(x, 0, 1).astype(x_ref.dtype)
        for r in range(ROWS):
            total += _product(x[r])
        return total

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] += jax.lax.fori_loop(0, rows // ROWS, group, zero)


def _flat_kernel(x_ref, out_ref, *, limits):
    lanes = x_ref.shape[1]
    step = min(lanes, _LANE_STEP)
    here = pl.program_id(0)
    _start(out_ref, (here,))

    def slab(index, total):
        lane = pl.multiple_of(index * step, step)
        x = x_ref[:, pl.ds(lane, step)]
        if limits[0] % lanes:
            wide = x.astype(jnp.float32)
            wide = tpu_tasks.mask(wide, (here * lanes + lane,), limits)
            x = wide.astype(x.dtype)
        return total + _product(x)

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] += jax.lax.fori_loop(0, lanes // step, slab, zero)


def _launch(x: chex.Array, *, interpret: bool) -> chex.Array:
    """Upper triangle, at least, of the [T, T] of x [T, rows, lanes] or [T, n]."""
    tasks, limits = x.shape[0], x.shape[1:]
    block = tpu_tasks.block(x.shape, tasks)
    out_shape = (tasks, tasks)
    if x.ndim == 2:
        kernel = _flat_kernel
    elif tasks > _MAX_PAIRED:
        kernel = _rows_kernel
    else:
        kernel, out_shape = _pairs_kernel, (tasks, tasks, _SUBLANES, LANES)
    out = pl.pallas_call(
        functools.partial(kernel, limits=limits),
        grid=tuple(map(pl.cdiv, limits, block)),
        in_specs=[pl.BlockSpec((tasks, *block), lambda *ids: (0, *ids))],
        out_specs=pl.BlockSpec(out_shape, lambda *ids: (0,) * len(out_shape)),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        interpret=interpret,
        name="gram",
    )(x)
    return out.sum(tuple(range(2, out.ndim)))


def gram(leaves: list[chex.Array], *, interpret: bool = False) -> chex.Array:
    """[T, T] float32 of leaves [T, ...]; only the upper triangle is to be relied on."""
    tasks = leaves[0].shape[0]
    total = jnp.zeros((tasks, tasks), jnp.float32)
    for numbers in tpu_tasks.plan(leaves):
        x = tpu_tasks.operand([leaves[i] for i in numbers])
        total += _launch(x, interpret=interpret)
    return total
