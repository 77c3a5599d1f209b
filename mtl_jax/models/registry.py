"""Backbones by name, for configs."""

import dataclasses
import difflib
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mtl_jax.models import multitask
from mtl_jax.models.backbones import bert, clip, decoder, encdec, mlp, small_conv, vit
from mtl_jax.models.backbones.bert import Bert
from mtl_jax.models.backbones.clip import Clip, ClipText
from mtl_jax.models.backbones.decoder import Decoder
from mtl_jax.models.backbones.decoder_sizes import DECODERS
from mtl_jax.models.backbones.encdec import EncoderDecoder
from mtl_jax.models.backbones.encdec_sizes import ENCODER_DECODERS
from mtl_jax.models.backbones.mlp import Mlp
from mtl_jax.models.backbones.sentence import SentenceEncoder
from mtl_jax.models.backbones.small_conv import SmallConv
from mtl_jax.models.backbones.vit import CLIP_OPTIONS, SIZES, ViT
from mtl_jax.models.heads import classifier
from mtl_jax.models.layers.sharding import Rules

_MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mlp": (Mlp, {}),
    "bert": (Bert, {}),
    "bert-base": (
        Bert,
        {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    ),
    "minilm-l6": (Bert, {}),
    "sentence-minilm-l6": (SentenceEncoder, {"make_encoder": Bert}),
    "sentence-minilm-l6-top2": (
        SentenceEncoder,
        {"make_encoder": functools.partial(Bert, depth=2, embed=False)},
    ),
    "small-conv": (SmallConv, {}),
    "vit": (ViT, {}),
    "vit-ti/16": (ViT, {"patch_size": 16, **SIZES["ti"]}),
    "vit-s/16": (ViT, {"patch_size": 16, **SIZES["s"]}),
    "vit-b/32": (ViT, {"patch_size": 32, **SIZES["b"]}),
    "vit-b/16": (ViT, {"patch_size": 16, **SIZES["b"]}),
    "vit-l/14": (ViT, {"patch_size": 14, **SIZES["l"]}),
    "vit-l/16": (ViT, {"patch_size": 16, **SIZES["l"]}),
    "clip-vit-b/32": (
        ViT,
        {"patch_size": 32, "projection": 512, **SIZES["b"], **CLIP_OPTIONS},
    ),
    "clip-vit-b/16": (
        ViT,
        {"patch_size": 16, "projection": 512, **SIZES["b"], **CLIP_OPTIONS},
    ),
    "clip-vit-l/14": (
        ViT,
        {"patch_size": 14, "projection": 768, **SIZES["l"], **CLIP_OPTIONS},
    ),
    "clip-text": (ClipText, {}),
    "clip-text-b": (ClipText, clip.TEXT_SIZES["b"]),
    "clip-text-l": (ClipText, clip.TEXT_SIZES["l"]),
    "clip": (Clip, clip.both("b", 32)),
    "clip-b/32": (Clip, clip.both("b", 32)),
    "clip-b/16": (Clip, clip.both("b", 16)),
    "clip-l/14": (Clip, clip.both("l", 14)),
    **{name: (Decoder, options) for name, options in DECODERS.items()},
    **{name: (EncoderDecoder, options) for name, options in ENCODER_DECODERS.items()},
}


_RULES: dict[type[nn.Module], Rules] = {
    Bert: bert.SHARDING_RULES,
    Clip: clip.SHARDING_RULES,
    ClipText: clip.TEXT_SHARDING_RULES,
    Decoder: decoder.SHARDING_RULES,
    EncoderDecoder: encdec.SHARDING_RULES,
    Mlp: mlp.SHARDING_RULES,
    SentenceEncoder: bert.SHARDING_RULES,
    SmallConv: small_conv.SHARDING_RULES,
    ViT: vit.SHARDING_RULES,
    classifier.Classifier: classifier.SHARDING_RULES,
}


def sharding_rules(*modules: nn.Module) -> Rules:
    """Sharding rules of some modules, in order, as the trainer takes them.

    Args:
      *modules: a backbone and its heads, for instance.

    Returns:
      (regex, PartitionSpec) pairs over the mesh axes `data` and `model`; the regex
      accepts any prefix of the path, so modules may be nested in one tree.

    Raises:
      ValueError: for a module without published rules.

    >>> len(sharding_rules(Mlp((4, 2))))
    2
    """
    for module in modules:
        if _rules_of(module) is None:
            known = ", ".join(sorted(cls.__name__ for cls in _RULES))
            raise ValueError(
                f"sharding_rules: none for {type(module).__name__}, known: {known}"
            )
    return tuple(rule for module in modules for rule in _rules_of(module) or ())


def _rules_of(module: nn.Module) -> Rules | None:
    if isinstance(module, multitask.MultiTaskModule):
        return multitask.SHARDING_RULES
    return _RULES.get(type(module))


def names() -> list[str]:
    """The names that `build` knows."""
    return sorted(_MODELS)


def build(name: str, **options: Any) -> nn.Module:
    """Makes a backbone by name.

    Args:
      name: one of `models.names()`.
      **options: attributes of the module; dtypes may be given by name ("bfloat16"),
        lists become tuples.

    Returns:
      The Linen module.

    Raises:
      ValueError: for a name or an option that does not exist, listing those that do.

    >>> build("vit-b/32", scan=True).width
    768
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"build: no model {name!r}{hint}, known: {', '.join(names())}")
    module, defaults = _MODELS[name]
    fields = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ValueError(
            f"build: {name!r} has no option {', '.join(map(repr, unknown))}, known: "
            f"{', '.join(sorted(fields))}"
        )
    return module(**{**defaults, **{k: _plain(k, v) for k, v in options.items()}})


def _plain(name, value):
    """Config data to what a module attribute wants."""
    if name in ("dtype", "param_dtype") and isinstance(value, str):
        try:
            return jnp.dtype(value)
        except TypeError as error:
            raise ValueError(f"build: {name} {value!r} is not a dtype") from error
    return tuple(value) if isinstance(value, list) else value
