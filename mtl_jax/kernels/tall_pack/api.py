"""The public `tall_pack`."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from mtl_jax.kernels import bits, dispatch
from mtl_jax.kernels.tall_pack import ref

_MAX_TASKS = 127  # counts are int8


class TallPack(NamedTuple):
    """What `tall_pack` returns for one leaf.

    Attributes:
      merged: float32 [...], the sum of the task vectors, or what was given.
      packed: uint8 [L, T, ceil(n / 8)], the masks, see `pack_bits`.
      counts: int8 [L, ...], how many tasks keep each entry.
    """

    merged: chex.Array
    packed: chex.Array
    counts: chex.Array


def _check(taus: chex.Array, scales: chex.Array, merged: chex.Array | None) -> None:
    if not jnp.issubdtype(taus.dtype, jnp.floating) or taus.dtype.itemsize > 4:
        raise ValueError(
            f"tall_pack: taus are {taus.dtype}, wanted a float of at most 32 bits"
        )
    if not taus.ndim or not 1 <= taus.shape[0] <= _MAX_TASKS:
        raise ValueError(
            f"tall_pack: taus are {taus.shape}, wanted [T, ...] with T in "
            f"[1, {_MAX_TASKS}]"
        )
    if scales.ndim != 1 or not scales.size:
        raise ValueError(f"tall_pack: scales are {scales.shape}, wanted [L], L >= 1")
    if merged is not None and merged.shape != taus.shape[1:]:
        raise ValueError(
            f"tall_pack: merged is {merged.shape}, wanted {taus.shape[1:]}"
        )


def tall_pack(
    taus: chex.Array,
    scales: chex.Array,
    *,
    merged: chex.Array | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> TallPack:
    """Sums task vectors and packs their TALL masks for several scales at once.

      mask[l, t] = |taus[t]| > scales[l] * |merged - taus[t]|

    Args:
      taus: float [T, ...], one leaf of the task vectors, n entries each; T <= 127.
      scales: [L], the values of lambda.
      merged: [...], the multi-task vector; None takes the sum over tasks.
      implementation: "xla", "pallas_tpu", or None; see `masked_restore`.
      interpret: run the Pallas kernel interpreted, for debugging on any machine.

    Returns:
      A `TallPack`.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run.

    >>> out = tall_pack(jnp.array([[3.0, 0.1], [0.2, 2.0]]), jnp.array([0.5]))
    >>> out.packed.tolist(), out.counts.tolist()
    ([[[1], [2]]], [[1, 1]])

    **Follows**: Wang et al. 2024, "Localizing Task Information for Improved Model
    Merging and Compression", the task masks; strict inequality as in its code.
    """
    taus, scales = jnp.asarray(taus), jnp.asarray(scales, jnp.float32)
    merged = None if merged is None else jnp.asarray(merged)
    _check(taus, scales, merged)
    shape = taus.shape[1:]
    size = int(np.prod(shape))
    fits = size >= 32768 and size % 128 == 0 and taus.dtype in _COMPILED
    chosen = dispatch.choose("tall_pack", implementation, (taus,), fits=fits)
    flat = taus.reshape(taus.shape[0], size)
    line = None if merged is None else merged.reshape(size)
    if chosen == "pallas_tpu" and size:
        if taus.dtype not in _COMPILED:
            raise ValueError(
                "tall_pack: implementation 'pallas_tpu' takes float32 and bfloat16, "
                f"found {taus.dtype}"
            )
        dispatch.require_tpu("tall_pack", (taus,), interpret=interpret)
        from mtl_jax.kernels.tall_pack import pallas_tpu  # only when it is used

        out = pallas_tpu.tall_pack(flat, scales, line, interpret=interpret)
    else:
        out = ref.tall_pack(flat, scales, line)
    total, packed, counts = out
    num_bytes = bits.num_bytes(size)
    return TallPack(
        total.reshape(shape),
        packed.reshape(scales.size, taus.shape[0], num_bytes),
        counts.reshape(scales.size, *shape),
    )


_COMPILED = (jnp.float32, jnp.bfloat16)
