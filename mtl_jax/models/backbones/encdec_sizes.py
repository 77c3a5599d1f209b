"""Options of `EncoderDecoder` for published language models."""

from typing import Any

from mtl_jax.models.backbones.decoder_sizes import shape

_T5 = {"gated": False, "activation": "relu", "scale_outputs": True, "tied": True}
_BART = {
    "vocab_size": 50265,
    "head_dim": None,
    "max_positions": 1024,
    "norm": "layer",
    "norm_eps": 1e-5,
    "post_norm": True,
    "embedding_norm": True,
    "position": "learned",
    "position_offset": 2,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
    "activation": "gelu",
    "query_scale": None,
    "tied": True,
    "head_bias": True,
}

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {},
    "t5-small": {**_T5, **shape(512, 6, 8, 2048)},
    "t5-base": {**_T5, **shape(768, 12, 12, 3072)},
    "t5-large": {**_T5, **shape(1024, 24, 16, 4096)},
    # Published as 3B and 11B.
    "t5-xl": {**_T5, **shape(1024, 24, 32, 16384, head_dim=128)},
    "t5-xxl": {**_T5, **shape(1024, 24, 128, 65536, head_dim=128)},
    "t5-v1.1-small": {},
    "t5-v1.1-base": shape(768, 12, 12, 2048),
    "t5-v1.1-large": shape(1024, 24, 16, 2816),
    "t5-v1.1-xl": shape(2048, 24, 32, 5120),
    "t5-v1.1-xxl": shape(4096, 24, 64, 10240),
    "bart-base": {**_BART, **shape(768, 6, 12, 3072)},
    "bart-large": {**_BART, **shape(1024, 12, 16, 4096)},
}
