"""Name tables of pretrained checkpoints, one per layout."""

from mtl_jax.io.names._bert import bert
from mtl_jax.io.names._clip_vision import clip_vision
from mtl_jax.io.names._table import NameTable, Rule
from mtl_jax.io.names._vit import vit

__all__ = ["NameTable", "Rule", "bert", "clip_vision", "vit"]
