"""Llama, and what shares its layout such as SmolLM2, as `transformers` stores it."""

from mtl_jax.io.names import _decoder
from mtl_jax.io.names._config import choose


def _options(config):
    bias = config.get("attention_bias", False)
    return {
        **_decoder.base_options("llama", config, tied=False, types=("llama",)),
        "activation": choose("llama", config, "hidden_act", {"silu": "silu"}, "silu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": config.get("mlp_bias", False),
    }


llama = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(qkv_bias=None, out_bias=None),
        *_decoder.gated_mlp(bias=None),
        *_decoder.two_norms(),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options,
)
