"""Gemma 1 and 2 as `transformers` stores them."""

from mtl_jax.io.names import _decoder
from mtl_jax.io.names._config import choose

_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


def _base(table, config):
    choose(
        table, config, "use_bidirectional_attention", {None: None, False: None}, None
    )
    bias = config.get("attention_bias", False)
    return {
        **_decoder.base_options(table, config, tied=True, types=(table,)),
        "head_dim": config.get("head_dim", 256),
        "norm_unit_offset": True,
        "scale_embeddings": True,
        "activation": _activation(table, config),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _activation(table, config):
    """First configs say "gelu" and, by an entry that is null, mean its tanh form."""
    if "hidden_activation" in config:
        config = {"hidden_act": config["hidden_activation"] or "gelu_pytorch_tanh"}
    return choose(table, config, "hidden_act", _ACTIVATIONS, "gelu_pytorch_tanh")


def _options_1(config):
    return _base("gemma", config)


def _options_2(config):
    depth = config.get("num_hidden_layers", 0)
    kinds = [("full" if i % 2 else "sliding") + "_attention" for i in range(depth)]
    options = _base("gemma2", config)
    return {
        **options,
        "post_norms": True,
        "query_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping", 50.0),
        "logit_softcap": config.get("final_logit_softcapping", 30.0),
        **_decoder.windows("gemma2", {"sliding_window": 4096, **config}, kinds),
    }


gemma = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(qkv_bias=None, out_bias=None),
        *_decoder.gated_mlp(),
        *_decoder.two_norms(),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options_1,
)

_LAYER = _decoder.LAYER
gemma2 = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(qkv_bias=None, out_bias=None),
        *_decoder.gated_mlp(),
        *_decoder.scale(f"{_LAYER}.input_layernorm", "layers_{i}/norm_attention"),
        *_decoder.scale(
            f"{_LAYER}.post_attention_layernorm", "layers_{i}/norm_attention_out"
        ),
        *_decoder.scale(f"{_LAYER}.pre_feedforward_layernorm", "layers_{i}/norm_mlp"),
        *_decoder.scale(
            f"{_LAYER}.post_feedforward_layernorm", "layers_{i}/norm_mlp_out"
        ),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options_2,
)
