"""Qwen2 (and 2.5) and Qwen3 as `transformers` stores them."""

from mtl_jax.io.names import _decoder
from mtl_jax.io.names._config import choose


def _base(table, config):
    return {
        **_decoder.base_options(table, config, tied=False, types=(table,)),
        "activation": choose(table, config, "hidden_act", {"silu": "silu"}, "silu"),
        **_windows(table, config),
    }


def _windows(table, config):
    if not config.get("use_sliding_window", False):
        return {"windows": ()}
    full = config.get("max_window_layers", 28)
    depth = config["num_hidden_layers"]
    kinds = [("full" if i < full else "sliding") + "_attention" for i in range(depth)]
    return _decoder.windows(table, config, kinds)


def _options_2(config):
    return {**_base("qwen2", config), "qkv_bias": True}


def _options_3(config):
    bias = config.get("attention_bias", False)
    return {
        **_base("qwen3", config),
        "head_dim": config.get("head_dim", 128),
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": "head",
    }


qwen2 = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(qkv_bias=True),
        *_decoder.gated_mlp(),
        *_decoder.two_norms(),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options_2,
)

qwen3 = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(qkv_bias=None, out_bias=None, norms=True),
        *_decoder.gated_mlp(),
        *_decoder.two_norms(),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options_3,
)
