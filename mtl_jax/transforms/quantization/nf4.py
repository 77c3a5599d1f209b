"""NF4: sixteen levels at quantiles of the normal distribution, scaled blockwise."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree

__all__ = ["LEVELS", "Quantized", "decode", "dequantize", "encode", "quantize"]

_SCALE_BLOCK = 256

LEVELS: np.ndarray = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""[16], ascending; code k stands for `LEVELS[k]`.

Quantiles of the normal distribution at eight equal steps of probability above zero and
seven below, and zero itself, divided by the largest: the published table.
"""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "steps", "shift"],
    meta_fields=["width", "block", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A leaf in 4 bits, which counts as the leaf [..., N] it stands for.

    Blocks lie along the last axis and do not cross rows, so that codes and scales are
    split, scanned and indexed along the other axes as the leaf would be.

    Attributes:
      codes: [..., ceil(N / K) K / 2] uint8, the first of each two in the high bits.
      scales: [..., ceil(N / K)], the largest magnitude of each block of K; float32, or
        with double quantisation [..., S, G] uint8.
      steps: None, or [..., S] float32, the largest magnitude of `scales - shift` in
        each group of G blocks.
      shift: None, or [..., 1] float32, the mean of the scales.
      width: N.
      block: K.
      dtype: name of the leaf's dtype.
    """

    codes: Any
    scales: Any
    steps: Any = None
    shift: Any = None
    width: int = 0
    block: int = 64
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return (*self.codes.shape[:-1], self.width)


def is_quantized(leaf: Any) -> bool:
    """Whether this is a `Quantized`; an `is_leaf` for `jax.tree`.

    >>> is_quantized(1.0)
    False
    """
    return isinstance(leaf, Quantized)


def encode(x: chex.Array, *, block: int = 64, double: bool = False) -> Quantized:
    """Rounds to the nearest level of each block: `code = argmin_k |x / s - q_k|`.

    Args:
      x: [..., N] floating point, finite.
      block: K, even; values that share a scale `s = max |x|`.
      double: keep the scales in 8 bits, in groups of 256 of a row: 4.13 bits a value
        instead of 4.5, where rows are long.

    Returns:
      A `Quantized`.

    Raises:
      ValueError: if x is not floating point or has no axis, or K is odd.

    >>> decode(encode(jnp.array([1.0, -2.0, 0.0, 0.16]), block=4)).round(2).tolist()
    [0.8799999952316284, -2.0, 0.0, 0.1599999964237213]

    **Follows**: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs",
    section 3 and appendix E.

    **Differs**: blocks do not cross rows. Groups of scales do not either, and their 8
    bits are integers of equal steps around the mean of the row, not 8-bit floats.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise ValueError(
            f"nf4.encode: wanted a floating array, found {x.dtype}{x.shape}"
        )
    if block < 2 or block % 2:
        raise ValueError(f"nf4.encode: block must be even and 2 or more, is {block}")
    return _encode(x, block, double)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(x, block, double):
    *lead, width = x.shape
    count = -(-width // block)
    padding = [(0, 0)] * len(lead) + [(0, count * block - width)]
    blocks = jnp.pad(x.astype(jnp.float32), padding).reshape(*lead, count, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    parts = {"scales": scales}
    if double:
        parts = _encode_scales(scales)
        scales = _decode_scales(**parts, count=count)
    safe = jnp.where(scales == 0, 1, scales)[..., None]
    bounds = jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2)
    # Fifteen comparisons, no table of sixteen distances.
    codes = sum((blocks / safe > bound).astype(jnp.uint8) for bound in bounds)
    codes = jnp.asarray(codes).reshape(*lead, count * block)
    packed = codes[..., 0::2] << jnp.uint8(4) | codes[..., 1::2]
    return Quantized(packed, **parts, width=width, block=block, dtype=str(x.dtype))


def _encode_scales(scales):
    *lead, count = scales.shape
    group = min(_SCALE_BLOCK, count)
    groups = -(-count // group)
    shift = jnp.mean(scales, axis=-1, keepdims=True)
    padding = [(0, 0)] * len(lead) + [(0, groups * group - count)]
    rest = jnp.pad(scales - shift, padding).reshape(*lead, groups, group)
    steps = jnp.max(jnp.abs(rest), axis=-1)
    ratio = rest / jnp.where(steps == 0, 1, steps)[..., None]
    codes = jnp.round(ratio * 127 + 128).astype(jnp.uint8)
    return {"scales": codes, "steps": steps, "shift": shift}


def _decode_scales(scales, steps, shift, count):
    *lead, groups, group = scales.shape
    rest = (scales.astype(jnp.float32) - 128) / 127 * steps[..., None]
    scales = rest.reshape(*lead, groups * group)[..., :count] + shift
    return jnp.maximum(scales, 0)


def decode(leaf: Quantized, dtype: Any = None) -> chex.Array:
    """The values that the codes stand for.

    Args:
      leaf: see `encode`.
      dtype: of the result; None = of the leaf that was encoded.

    Returns:
      [..., N].

    >>> decode(encode(jnp.array([3.0, -3.0]))).tolist()
    [3.0, -3.0]
    """
    codes, scales = leaf.codes, leaf.scales
    *lead, half = codes.shape
    count = 2 * half // leaf.block
    if leaf.steps is not None:
        scales = _decode_scales(scales, leaf.steps, leaf.shift, count)
    pairs = jnp.stack([codes >> jnp.uint8(4), codes & jnp.uint8(15)], axis=-1)
    values = jnp.asarray(LEVELS)[pairs.reshape(*lead, count, leaf.block)]
    values = (values * scales[..., None]).reshape(*lead, 2 * half)
    return values[..., : leaf.width].astype(leaf.dtype if dtype is None else dtype)


def quantize(
    params: chex.ArrayTree, *rules: str, block: int = 64, double: bool = False
) -> chex.ArrayTree:
    """Encodes the leaves that the rules find; the others stay as they are.

    Args:
      params: parameters.
      *rules: regular expressions, searched in leaf names.
      block: see `encode`.
      double: see `encode`.

    Returns:
      Tree like `params` with `Quantized` leaves, nodes of its own.

    Raises:
      ValueError: a rule that finds no leaf or one that is not floating point, or
        values that are not finite, by leaf.

    >>> small = quantize({"w": jnp.ones((4, 64)), "b": jnp.ones(4)}, "w")
    >>> tree.nbytes(small), decode(small["w"]).shape
    (160, (4, 64))
    """
    chosen = tree.select(params, *rules)
    found = jax.tree.map(lambda x, hit: x if hit else None, params, chosen)
    tree.check_finite("nf4.quantize", found)

    def leaf(name, x, hit):
        try:
            return encode(x, block=block, double=double) if hit else x
        except ValueError as error:
            raise ValueError(f"nf4.quantize: {name!r}: {error}") from error

    return tree.map_with_path(leaf, params, chosen)


def dequantize(params: chex.ArrayTree, dtype: Any = None) -> chex.ArrayTree:
    """Decodes every `Quantized` leaf; inside a loss, each where it is used.

    >>> dequantize(quantize({"w": jnp.array([[2.0, -2.0]])}, "w"))["w"].tolist()
    [[2.0, -2.0]]
    """
    return jax.tree.map(
        lambda x: decode(x, dtype) if is_quantized(x) else x,
        params,
        is_leaf=is_quantized,
    )
