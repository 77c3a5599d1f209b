"""`masked_restore` for TPU: the mask is expanded in registers.

Reads the base, the delta and one bit per entry, writes the result. A leaf whose size
is not a multiple of 128 is padded first, which costs a copy.
"""

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.kernels import tpu_bits

_TILES = 4  # tiles per block: 512 KiB of float32 for each operand


def _kernel(scale_ref, packed_ref, base_ref, delta_ref, out_ref):
    scale = scale_ref[0]
    for tile in range(packed_ref.shape[0] // tpu_bits.TILE_BYTES):
        bytes_ = pl.ds(tile * tpu_bits.TILE_BYTES, tpu_bits.TILE_BYTES)
        planes = tpu_bits.planes_from_packed(packed_ref[bytes_, :])
        for group in range(tpu_bits.GROUPS):
            rows = pl.ds(tile * tpu_bits.TILE_ROWS + group * 32, 32)
            keep = tpu_bits.expand(planes, group)
            step = jnp.where(keep, delta_ref[rows, :].astype(jnp.float32), 0.0)
            moved = base_ref[rows, :].astype(jnp.float32) + scale * step
            out_ref[rows, :] = moved.astype(out_ref.dtype)


def _rows(x: chex.Array, lanes: int) -> chex.Array:
    """[n] -> [ceil(n / lanes), lanes]; a copy only where n does not divide."""
    flat = x.reshape(-1)
    pad = -flat.size % lanes
    return (jnp.pad(flat, (0, pad)) if pad else flat).reshape(-1, lanes)


def masked_restore(
    base: chex.Array,
    delta: chex.Array,
    packed: chex.Array,
    scale: chex.Array,
    *,
    interpret: bool = False,
) -> chex.Array:
    """`base + scale * where(bit, delta, 0)`; see the public function."""
    lanes = tpu_bits.LANES
    rows, moves = _rows(base, lanes), _rows(delta, lanes)
    tiles = min(_TILES, pl.cdiv(rows.shape[0], tpu_bits.TILE_ROWS))
    block, mask_block = tiles * tpu_bits.TILE_ROWS, tiles * tpu_bits.TILE_BYTES
    grid = pl.cdiv(rows.shape[0], block)
    wanted = grid * mask_block * lanes
    bits = jnp.pad(packed, (0, wanted - packed.size)).reshape(-1, lanes)

    def spec(height):
        return pl.BlockSpec((height, lanes), lambda i: (i, 0))

    out = pl.pallas_call(
        _kernel,
        grid=(grid,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            spec(mask_block),
            spec(block),
            spec(block),
        ],
        out_specs=spec(block),
        out_shape=jax.ShapeDtypeStruct(rows.shape, base.dtype),
        interpret=interpret,
        name="masked_restore",
    )(scale.astype(jnp.float32).reshape(1), bits, rows, moves)
    return out.reshape(-1)[: base.size].reshape(base.shape)
