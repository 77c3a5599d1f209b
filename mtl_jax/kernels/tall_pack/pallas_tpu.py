"""`tall_pack` for TPU: every task vector is read once for all scales."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.kernels import tpu_bits
from mtl_jax.kernels.bits import num_bytes


def _kernel(*refs, num_tasks, num_scales, given):
    scales_ref, taus_ref = refs[:2]
    sum_ref, packed_ref, counts_ref, planes_ref = refs[2 + given :]

    def group(index, carry):
        rows = pl.ds(index * 32, 32)
        taus = [taus_ref[t, rows, :].astype(jnp.float32) for t in range(num_tasks)]
        merged = refs[2][rows, :] if given else functools.reduce(jnp.add, taus)
        sum_ref[rows, :] = merged
        for s in range(num_scales):
            count = jnp.zeros((32, tpu_bits.LANES), jnp.int32)
            for t, tau in enumerate(taus):
                keep = jnp.abs(tau) > scales_ref[s] * jnp.abs(merged - tau)
                count = count + keep.astype(jnp.int32)
                planes_ref[s * num_tasks + t, pl.ds(index, 1), :] = tpu_bits.collect(
                    keep
                )
            counts_ref[s, rows, :] = count.astype(jnp.int8)
        return carry

    def emit(index, carry):
        packed_ref[index, :, :] = tpu_bits.packed_from_planes(planes_ref[index, :, :])
        return carry

    jax.lax.fori_loop(0, tpu_bits.GROUPS, group, 0)
    jax.lax.fori_loop(0, num_tasks * num_scales, emit, 0)


def tall_pack(
    taus: chex.Array,
    scales: chex.Array,
    merged: chex.Array | None,
    *,
    interpret: bool = False,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """(merged [n], packed [L, T, ceil(n / 8)], counts [L, n]) of taus [T, n]."""
    (num_tasks, size), num_scales = taus.shape, scales.shape[0]
    lanes, rows = tpu_bits.LANES, pl.cdiv(size, tpu_bits.LANES)
    pad = rows * lanes - size
    grid = pl.cdiv(rows, tpu_bits.TILE_ROWS)
    masks = num_tasks * num_scales

    def lines(x):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
        return x.reshape(*x.shape[:-1], rows, lanes)

    def spec(*lead, height=tpu_bits.TILE_ROWS):
        return pl.BlockSpec((*lead, height, lanes), lambda i: (0,) * len(lead) + (i, 0))

    given = [] if merged is None else [lines(merged.astype(jnp.float32))]
    total, packed, counts = pl.pallas_call(
        functools.partial(
            _kernel, num_tasks=num_tasks, num_scales=num_scales, given=len(given)
        ),
        grid=(grid,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            spec(num_tasks),
            *[spec()] * len(given),
        ],
        out_specs=[spec(), spec(masks, height=tpu_bits.TILE_BYTES), spec(num_scales)],
        out_shape=[
            jax.ShapeDtypeStruct((rows, lanes), jnp.float32),
            jax.ShapeDtypeStruct((masks, grid * tpu_bits.TILE_BYTES, lanes), jnp.uint8),
            jax.ShapeDtypeStruct((num_scales, rows, lanes), jnp.int8),
        ],
        scratch_shapes=[pltpu.VMEM((masks, tpu_bits.GROUPS, lanes), jnp.uint32)],
        interpret=interpret,
        name="tall_pack",
    )(scales.astype(jnp.float32), lines(taus), *given)
    packed = packed.reshape(num_scales, num_tasks, -1)[..., : num_bytes(size)]
    return (
        total.reshape(-1)[:size],
        packed,
        counts.reshape(num_scales, -1)[:, :size],
    )
