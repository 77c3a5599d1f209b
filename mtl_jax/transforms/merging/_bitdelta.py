"""BitDelta: a fine-tuning as one bit per entry and one number per matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import kernels, tree
from mtl_jax.transforms.merging import _compose


class BitDelta(NamedTuple):
    """Compressed task vectors, by the names of their leaves.

    Attributes:
      signs: uint8 [T, ceil(n / 8)] per compressed leaf, True = not negative, in the
        order of `masking.pack`.
      scales: float32 [T] per compressed leaf; can be trained.
      rest: [T, ...] per leaf that is kept as it is.
    """

    signs: dict[str, jax.Array]
    scales: dict[str, jax.Array]
    rest: dict[str, jax.Array]


@jax.jit
def _compress(x: jax.Array) -> tuple[Any, jax.Array]:
    flat = x.reshape(x.shape[0], -1)
    scale = jnp.mean(jnp.abs(flat).astype(tree.wide_dtype(x.dtype)), 1)
    return kernels.pack_bits(flat >= 0), scale.astype(jnp.float32)


def bitdelta(
    taus: Any,
    *,
    matrices: Callable[[str], bool] | None = None,
    check_finite: bool = True,
) -> BitDelta:
    """Keeps of every matrix the signs of its change and their mean magnitude.

    tau_t ~ scale_t sign(tau_t),   scale_t = mean |tau_t| per matrix

    the scale that is nearest in the sum of squares.

    Args:
      taus: task tree, leaves [T, ...].
      matrices: which leaves to compress, by name; by default all parameters of two
        and more axes.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      `BitDelta`, a pytree, about 32 times smaller for float32 matrices.

    Raises:
      ValueError: a matrix that is complex, no floating point leaf, or NaN or infinity.

    Follows: Liu et al. 2024, "BitDelta: Your Fine-Tune May Only Be Worth One Bit",
      without the distillation of the scales.
    Differs: eight signs to a byte, row-major over the leaf; the released code packs 32
      along the input axis, and compresses linear layers of the blocks only.

    >>> bits = bitdelta({"w": jnp.array([[[3.0, -1.0], [0.0, -4.0]]])})
    >>> bits.signs["w"].tolist(), bits.scales["w"].tolist()
    ([[5]], [2.0])
    """
    _compose.check_taus("bitdelta", taus, None, check_finite)
    _compose.check_real("bitdelta", taus)
    signs, scales, rest = {}, {}, {}
    for name, x in zip(tree.paths(taus), jax.tree.leaves(taus), strict=True):
        wanted = x.ndim > 2 if matrices is None else matrices(name)
        if wanted and tree.is_inexact(x) and x.size:
            signs[name], scales[name] = _compress(x)
        else:
            rest[name] = x
    return BitDelta(signs, scales, rest)


def bitdelta_restore(compressed: BitDelta, task: Any, like: Any) -> Any:
    """One task's delta out of a `BitDelta`, `scale_t sign_t`; added at scale 1.

    Args:
      compressed: from `bitdelta`.
      task: index of the task; may be traced.
      like: tree of arrays or of `jax.ShapeDtypeStruct` [...] with the shapes of one
        task and the dtypes of the result, such as the base.

    Returns:
      Tree like `like`.

    Raises:
      ValueError: there is no such task, or `like` does not fit.

    Follows: Liu et al. 2024, "BitDelta".

    >>> taus = {"w": jnp.array([[[3.0, -1.0], [0.0, -4.0]]])}
    >>> bitdelta_restore(bitdelta(taus), 0, {"w": jnp.zeros((2, 2))})["w"].tolist()
    [[2.0, -2.0], [2.0, -2.0]]
    """
    names = {*compressed.signs, *compressed.rest}
    have = set(tree.paths(like))
    if names != have:
        raise ValueError(
            f"bitdelta_restore: {min(names ^ have)!r} is in only one of the compressed "
            "task vectors and like"
        )
    count = len(next(iter({**compressed.scales, **compressed.rest}.values())))
    task = _compose.check_task("bitdelta_restore", task, count)

    def leaf(name, x):
        if name in compressed.rest:
            value = compressed.rest[name][task]
            fits = value.shape == x.shape
        else:
            packed = compressed.signs[name][task]
            fits = packed.shape[0] == kernels.num_bytes(tree.size(x))
            value = compressed.scales[name][task]
        if not fits:
            raise ValueError(
                f"bitdelta_restore: {name!r} is {x.shape} in like, which does not fit"
            )
        if name in compressed.signs:
            positive = kernels.unpack_bits(packed, tree.size(x)).reshape(x.shape)
            value = jnp.where(positive, value, -value)
        return value.astype(x.dtype)

    return tree.map_with_path(leaf, like)
