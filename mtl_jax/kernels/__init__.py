"""Fused operations with a plain definition each, and compiled ones where they pay.

Every operation takes `implementation=None | "xla" | "pallas_tpu"`: None picks what is
known to run, a named one runs or raises. `list_kernels` names them for ahead-of-time
compilation.
"""

from mtl_jax.kernels.bits import num_bytes, pack_bits, unpack_bits
from mtl_jax.kernels.catalogue import list_kernels
from mtl_jax.kernels.gram.api import gram, gram_tree
from mtl_jax.kernels.masked_restore.api import masked_restore
from mtl_jax.kernels.tall_pack.api import TallPack, tall_pack
from mtl_jax.kernels.weighted_combine.api import combine_tree, weighted_combine

__all__ = [
    "TallPack",
    "combine_tree",
    "gram",
    "gram_tree",
    "list_kernels",
    "masked_restore",
    "num_bytes",
    "pack_bits",
    "tall_pack",
    "unpack_bits",
    "weighted_combine",
]
