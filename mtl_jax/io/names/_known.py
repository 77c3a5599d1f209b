"""The table that a configuration asks for."""

from collections.abc import Mapping
from typing import Any

from mtl_jax.io.names._bart import bart
from mtl_jax.io.names._bert import bert
from mtl_jax.io.names._clip import clip, clip_text, clip_vision
from mtl_jax.io.names._gemma import gemma, gemma2
from mtl_jax.io.names._gpt2 import gpt2
from mtl_jax.io.names._llama import llama
from mtl_jax.io.names._olmoe import olmoe
from mtl_jax.io.names._qwen import qwen2, qwen3
from mtl_jax.io.names._t5 import t5
from mtl_jax.io.names._table import NameTable
from mtl_jax.io.names._vit import vit

_BY_TYPE = {
    "bart": bart,
    "bert": bert,
    "clip": clip,
    "clip_text_model": clip_text,
    "clip_vision_model": clip_vision,
    "gemma": gemma,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "llama": llama,
    "olmoe": olmoe,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "t5": t5,
    "vit": vit,
}


def of_config(
    config: Mapping[str, Any], *, model: str | None = None, where: str = "of_config"
) -> NameTable:
    """The table for a `config.json`, by its `model_type`.

    Args:
      config: parsed.
      model: only tables of this backbone; None = of any.
      where: what an error begins with.

    Raises:
      ValueError: for a type that no table knows, listing those that there are.

    >>> of_config({"model_type": "qwen3"}).model
    'decoder'
    """
    kind = config.get("model_type")
    known = {k: t for k, t in _BY_TYPE.items() if model in (None, t.model)}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{where}: model_type {kind!r} is not supported, only {', '.join(known)}"
        )
    return known[kind]
