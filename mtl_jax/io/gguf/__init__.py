"""The GGUF format: checked lazy reading, decoding of quantised tensors, writing.

A file is a header (magic number, version, counts), typed metadata, a table of tensors
and their aligned little-endian bytes; a tensor's axes are listed fastest first.
"""

from mtl_jax.io.gguf._load import find, load, name_table
from mtl_jax.io.gguf._reader import GgufFile
from mtl_jax.io.gguf._tokenizer import special_tokens, tokenizer
from mtl_jax.io.gguf._writer import save

__all__ = [
    "GgufFile",
    "find",
    "load",
    "name_table",
    "save",
    "special_tokens",
    "tokenizer",
]
