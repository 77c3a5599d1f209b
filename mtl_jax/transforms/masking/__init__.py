"""Masks over parameters: how dense, which entries, kept by optimizers, packed in bits.

True = active everywhere. A mask is *structural* where a leaf is a Python bool (the
whole leaf, or the whole subtree at that place), *elementwise* where it is an array.
"""

from mtl_jax.transforms.masking._bank import MaskBank
from mtl_jax.transforms.masking._compact import CompactStep, compact, compact_step
from mtl_jax.transforms.masking._keep import keep, wrap
from mtl_jax.transforms.masking._packing import pack, unpack
from mtl_jax.transforms.masking._select import density, magnitude, random

__all__ = [
    "CompactStep",
    "MaskBank",
    "compact",
    "compact_step",
    "density",
    "keep",
    "magnitude",
    "pack",
    "random",
    "unpack",
    "wrap",
]
