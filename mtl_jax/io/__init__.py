"""Files: safetensors, pretrained checkpoints, trees of arrays, training checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

from mtl_jax.io import names, safetensors
from mtl_jax.io.params import digest, load_tree, save_tree
from mtl_jax.io.pretrained import load_pretrained, read_config, save_pretrained

if TYPE_CHECKING:
    from mtl_jax.io import checkpoint

__all__ = [
    "checkpoint",
    "digest",
    "load_pretrained",
    "load_tree",
    "names",
    "read_config",
    "safetensors",
    "save_pretrained",
    "save_tree",
]


def __getattr__(name: str) -> Any:
    if name == "checkpoint":  # Loads Orbax.
        return importlib.import_module("mtl_jax.io.checkpoint")
    raise AttributeError(f"module 'mtl_jax.io' has no attribute {name!r}")
