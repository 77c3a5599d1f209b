"""`weighted_combine` for TPU: every task's entries are read once for all sums."""

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.kernels import tpu_tasks
from mtl_jax.kernels.tpu_tasks import LANES, ROWS

MAX_SUMS = 16
_UNROLL = 8


def _rows_kernel(weights_ref, x_ref, out_ref):
    tasks, rows, lanes = x_ref.shape
    sums, across = out_ref.shape[0], lanes // LANES

    def chunk(index, carry):
        row = pl.multiple_of(jax.lax.div(index, across) * ROWS, ROWS)
        lane = pl.multiple_of(jax.lax.rem(index, across) * LANES, LANES)
        here = pl.ds(row, ROWS), pl.ds(lane, LANES)

        def task(t, totals):
            x = x_ref[t, *here].astype(jnp.float32)
            return tuple(s + weights_ref[m, t] * x for m, s in enumerate(totals))

        first = x_ref[0, *here].astype(jnp.float32)
        totals = tuple(weights_ref[m, 0] * first for m in range(sums))
        unroll = max(min(tasks - 1, _UNROLL // sums), 1)
        totals = jax.lax.fori_loop(1, tasks, task, totals, unroll=unroll)
        for m, total in enumerate(totals):
            out_ref[m, *here] = total.astype(out_ref.dtype)
        return carry

    jax.lax.fori_loop(0, rows // ROWS * across, chunk, 0)


def _flat_kernel(weights_ref, x_ref, out_ref):
    sums, lanes = out_ref.shape
    step = min(lanes, 1024)

    def slab(index, carry):
        here = pl.ds(pl.multiple_of(index * step, step), step)
        x = x_ref[:, here].astype(jnp.float32)
        out = [
            jnp.sum(x * weights_ref[:, m : m + 1], axis=0, keepdims=True)
            for m in range(sums)
        ]
        out_ref[:, here] = jnp.concatenate(out, axis=0).astype(out_ref.dtype)
        return carry

    jax.lax.fori_loop(0, lanes // step, slab, 0)


def _launch(x: chex.Array, weights: chex.Array, *, interpret: bool) -> chex.Array:
    """[M, rows, lanes] or [M, n] of x with T in the place of M."""
    sums, tasks = weights.shape
    block = tpu_tasks.block(x.shape, tasks + sums)
    if x.ndim == 3:
        kernel, given = _rows_kernel, weights
        spec = pl.BlockSpec(memory_space=pltpu.SMEM)
    else:
        kernel, given = _flat_kernel, weights.T
        spec = pl.BlockSpec((tasks, sums), lambda *ids: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=tuple(map(pl.cdiv, x.shape[1:], block)),
        in_specs=[spec, pl.BlockSpec((tasks, *block), lambda *ids: (0, *ids))],
        out_specs=pl.BlockSpec((sums, *block), lambda *ids: (0, *ids)),
        out_shape=jax.ShapeDtypeStruct((sums, *x.shape[1:]), x.dtype),
        interpret=interpret,
        name="weighted_combine",
    )(given, x)


def weighted_combine(
    leaves: list[chex.Array], weights: chex.Array, *, interpret: bool = False
) -> list[chex.Array]:
    """Leaves [M, ...] of leaves [T, ...] and weights [M, T]."""
    weights = weights.astype(jnp.float32)
    out: list[chex.Array] = [
        jnp.zeros((weights.shape[0], *x.shape[1:]), x.dtype) for x in leaves
    ]
    for numbers in tpu_tasks.plan(leaves):
        some = [leaves[i] for i in numbers]
        launched = _launch(tpu_tasks.operand(some), weights, interpret=interpret)
        parts = tpu_tasks.restore(launched, [x.shape[1:] for x in some])
        for i, part in zip(numbers, parts, strict=True):
            out[i] = part
    return out
