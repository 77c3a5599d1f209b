"""The public `masked_restore`."""

import functools

import chex
import jax
import jax.numpy as jnp

from mtl_jax.kernels import bits, dispatch
from mtl_jax.kernels.masked_restore import ref


def _check(base: chex.Array, delta: chex.Array, packed: chex.Array) -> None:
    for name, x in (("base", base), ("delta", delta)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"masked_restore: {name} is {x.dtype}, wanted a float")
    if base.shape != delta.shape:
        raise ValueError(
            f"masked_restore: delta is {delta.shape}, base is {base.shape}"
        )
    wanted = (bits.num_bytes(base.size),)
    if packed.dtype != jnp.uint8 or packed.shape != wanted:
        raise ValueError(
            f"masked_restore: packed is {packed.dtype}{list(packed.shape)}, wanted "
            f"uint8{list(wanted)} for a leaf {base.shape}"
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _restore(base, delta, packed, scale, implementation, interpret):
    if implementation == "xla" or not base.size:
        return ref.masked_restore(base, delta, packed, scale)
    from mtl_jax.kernels.masked_restore import pallas_tpu  # only when it is used

    return pallas_tpu.masked_restore(base, delta, packed, scale, interpret=interpret)


@_restore.defjvp
def _restore_jvp(implementation, interpret, primals, tangents):
    base, delta, packed, scale = primals
    base_dot, delta_dot, _, scale_dot = tangents
    out = _restore(base, delta, packed, scale, implementation, interpret)
    moved = ref.masked_restore(base_dot, delta_dot, packed, scale)
    zero = jnp.zeros_like(base)
    return out, moved + ref.masked_restore(zero, delta, packed, scale_dot)


def _supported(base: chex.Array, delta: chex.Array) -> bool:
    narrow = (jnp.float32, jnp.bfloat16)
    return base.dtype in narrow and delta.dtype in narrow


def masked_restore(
    base: chex.Array,
    delta: chex.Array,
    packed: chex.Array,
    *,
    scale: chex.Numeric = 1.0,
    implementation: str | None = None,
    interpret: bool = False,
) -> chex.Array:
    """Adds the entries of a delta that a packed mask keeps.

      out = base + scale * where(bit, delta, 0)

    Args:
      base: float [...], n entries.
      delta: float, shape of `base`.
      packed: uint8 [ceil(n / 8)], see `pack_bits`; row-major entries of `base`.
      scale: scalar.
      implementation: "xla", "pallas_tpu", or None: the Pallas kernel for concrete
        arrays of at least 32,768 entries on one TPU chip, else "xla". Name it inside
        `jit`, where placement is not known; over several devices it needs `shard_map`.
      interpret: run the Pallas kernel interpreted, for debugging on any machine.

    Returns:
      Shape and dtype of `base`; computed in float32 (or wider), cast once.
      Differentiable in `base`, `delta` and `scale`.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run.

    >>> packed = jnp.array([0b101], jnp.uint8)
    >>> masked_restore(jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]), packed)
    Array([1., 0., 3.], dtype=float32)

    **Follows**: Wang et al. 2024, "Localizing Task Information for Improved Model
    Merging and Compression", the reconstruction of one task (scale 1 there).
    """
    base, delta, packed = map(jnp.asarray, (base, delta, packed))
    scale = jnp.asarray(scale, jnp.float32)
    _check(base, delta, packed)
    if scale.shape:
        raise ValueError(f"masked_restore: scale is {scale.shape}, wanted a scalar")
    fits = _supported(base, delta) and base.size >= 32768 and base.size % 128 == 0
    arrays = (base, delta, packed)
    chosen = dispatch.choose("masked_restore", implementation, arrays, fits=fits)
    if chosen == "pallas_tpu":
        if not _supported(base, delta):
            raise ValueError(
                "masked_restore: implementation 'pallas_tpu' takes float32 and "
                f"bfloat16, found {base.dtype} and {delta.dtype}"
            )
        dispatch.require_tpu("masked_restore", arrays, interpret=interpret)
    return _restore(base, delta, packed, scale, chosen, interpret)
