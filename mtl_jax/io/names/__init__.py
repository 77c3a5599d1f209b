"""Name tables of pretrained checkpoints, one per layout."""

from mtl_jax.io.names._bart import bart
from mtl_jax.io.names._bert import bert
from mtl_jax.io.names._clip import clip, clip_text, clip_vision
from mtl_jax.io.names._gemma import gemma, gemma2
from mtl_jax.io.names._gguf_llama import gguf_llama
from mtl_jax.io.names._gpt2 import gpt2
from mtl_jax.io.names._known import of_config
from mtl_jax.io.names._llama import llama
from mtl_jax.io.names._olmoe import olmoe
from mtl_jax.io.names._qwen import qwen2, qwen3
from mtl_jax.io.names._t5 import t5
from mtl_jax.io.names._table import NameTable, Rule
from mtl_jax.io.names._vit import vit

__all__ = [
    "NameTable",
    "Rule",
    "bart",
    "bert",
    "clip",
    "clip_text",
    "clip_vision",
    "gemma",
    "gemma2",
    "gguf_llama",
    "gpt2",
    "llama",
    "of_config",
    "olmoe",
    "qwen2",
    "qwen3",
    "t5",
    "vit",
]
