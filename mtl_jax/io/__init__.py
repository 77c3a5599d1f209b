"""Files: safetensors, GGUF, pretrained checkpoints, tokenizers, trees, checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

from mtl_jax.io import gguf, names, safetensors
from mtl_jax.io.chat import ChatFormat, read_chat_format, render_chat
from mtl_jax.io.params import digest, load_tree, save_tree
from mtl_jax.io.pretrained import load_pretrained, read_config, save_pretrained
from mtl_jax.io.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from mtl_jax.io import checkpoint

__all__ = [
    "ChatFormat",
    "checkpoint",
    "digest",
    "gguf",
    "load_pretrained",
    "load_tokenizer",
    "load_tree",
    "names",
    "read_chat_format",
    "read_config",
    "render_chat",
    "safetensors",
    "save_pretrained",
    "save_tree",
]


def __getattr__(name: str) -> Any:
    if name == "checkpoint":  # Loads Orbax.
        return importlib.import_module("mtl_jax.io.checkpoint")
    raise AttributeError(f"module 'mtl_jax.io' has no attribute {name!r}")
