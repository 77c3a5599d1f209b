"""GPT-2 as `transformers` stores it: [in, out], query, key and value in one tensor."""

import re

import numpy as np

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._decoder import HEAD, DecoderTable, LazyTensors
from mtl_jax.io.names._leaves import HostLeaf
from mtl_jax.io.names._table import Rule, norm

_LAYER = "transformer.h.{i}"
_PARTS = ("query", "key", "value")
_FUSED = re.compile(r"(.*\battn\.c_attn)\.(weight|bias)")
_SPLIT = re.compile(r"(.*\battn\.c_attn)\.query\.(weight|bias)")


def _options(config):
    choose("gpt2", config, "model_type", {"gpt2": None}, "gpt2")
    for flag in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        choose("gpt2", config, flag, {False: None}, False)
    options = take(
        "gpt2",
        config,
        vocab_size="vocab_size",
        width="n_embd",
        depth="n_layer",
        num_heads="n_head",
        max_positions="n_positions",
    )
    return {
        **options,
        "num_kv_heads": None,
        "mlp_dim": config.get("n_inner") or 4 * options["width"],
        "norm": "layer",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": choose(
            "gpt2", config, "activation_function", _ACTIVATIONS, "gelu_new"
        ),
        "query_scale": None if config.get("scale_attn_weights", True) else 1.0,
        "tied": config.get("tie_word_embeddings", True),
    }


_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def _group(tensors, where):
    """Splits the fused projection."""
    readers = {}
    for name in tensors:
        if match := _FUSED.fullmatch(name):
            for number, part in enumerate(_PARTS):
                readers[f"{match[1]}.{part}.{match[2]}"] = (
                    lambda name=name, number=number: _third(
                        where, name, tensors[name], number
                    )
                )
        else:
            readers[name] = lambda name=name: tensors[name]
    return LazyTensors(readers)


def _third(where, name, array, number):
    width, rest = divmod(array.shape[-1], 3)
    if rest:
        raise ValueError(
            f"{where}: {name!r} is {array.shape}, wanted three parts of one width"
        )
    return array[..., number * width : (number + 1) * width]


def _ungroup(tensors):
    out = {}
    for name, leaf in tensors.items():
        if match := _SPLIT.fullmatch(name):
            parts = [tensors[f"{match[1]}.{part}.{match[2]}"] for part in _PARTS]
            shape = (*leaf.shape[:-1], 3 * leaf.shape[-1])
            out[f"{match[1]}.{match[2]}"] = HostLeaf(
                shape,
                leaf.dtype,
                lambda parts=parts: np.concatenate([p.read() for p in parts], axis=-1),
            )
        elif not re.fullmatch(r".*\.c_attn\.(key|value)\.(weight|bias)", name):
            out[name] = leaf
    return out


def _conv(name, path):
    """Weight and bias; the weight lies as ours does."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel"),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


gpt2 = DecoderTable(
    model="decoder",
    rules=(
        Rule("transformer.wte.weight", "embeddings/word/embedding"),
        Rule("transformer.wpe.weight", "embeddings/position/embedding"),
        *(
            rule
            for part in _PARTS
            for rule in _conv(
                f"{_LAYER}.attn.c_attn.{part}", f"layers_{{i}}/attention/{part}"
            )
        ),
        *_conv(f"{_LAYER}.attn.c_proj", "layers_{i}/attention/out"),
        *_conv(f"{_LAYER}.mlp.c_fc", "layers_{i}/mlp/in"),
        *_conv(f"{_LAYER}.mlp.c_proj", "layers_{i}/mlp/out"),
        *norm(f"{_LAYER}.ln_1", "layers_{i}/norm_attention"),
        *norm(f"{_LAYER}.ln_2", "layers_{i}/norm_mlp"),
        *norm("transformer.ln_f", "norm"),
        HEAD,
    ),
    aliases=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    ignore=(r".*\.attn\.(bias|masked_bias)",),
    options=_options,
    group=_group,
    ungroup=_ungroup,
)
