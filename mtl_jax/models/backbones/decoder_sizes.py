"""Options of `Decoder` for published language models."""

from typing import Any

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "rotary_base": 5e5,
    "tied": False,
}
_LLAMA_31_SCALING = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
}
_QWEN_2 = {
    "vocab_size": 151936,
    "norm_eps": 1e-6,
    "rotary_base": 1e6,
    "qkv_bias": True,
    "max_positions": 32768,
}
_QWEN_3 = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rotary_base": 1e6,
    "qk_norm": "head",
    "max_positions": 40960,
}
_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "norm_eps": 1e-6,
    "norm_unit_offset": True,
    "rotary_base": 1e4,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
}
_GEMMA_2 = {
    **_GEMMA,
    "post_norms": True,
    "query_scale": 256**-0.5,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "windows": (4096, 0),
}
_GPT_2 = {
    "vocab_size": 50257,
    "num_kv_heads": None,
    "max_positions": 1024,
    "norm": "layer",
    "position": "learned",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
    "activation": "gelu_tanh",
}


def shape(
    width: int, depth: int, num_heads: int, mlp_dim: int, **more: Any
) -> dict[str, Any]:
    """Options by their names."""
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
        **more,
    }


def _gpt_2(width, depth, num_heads):
    return {**_GPT_2, **shape(width, depth, num_heads, 4 * width)}


_LLAMA_31 = {
    **_LLAMA_3,
    "max_positions": 131072,
    "rotary_scaling": _LLAMA_31_SCALING,
}
_LLAMA_32 = {
    **_LLAMA_31,
    "rotary_scaling": {**_LLAMA_31_SCALING, "factor": 32.0},
    "tied": True,
}
_LLAMA_2 = {
    "vocab_size": 32000,
    "num_kv_heads": None,
    "max_positions": 4096,
    "rotary_base": 1e4,
    "tied": False,
}
_SHAPE_8B = shape(4096, 32, 32, 14336)
_SHAPE_70B = shape(8192, 80, 64, 28672)

DECODERS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "smollm2-135m": {},
    "smollm2-360m": shape(960, 32, 15, 2560, num_kv_heads=5),
    "smollm2-1.7b": shape(2048, 24, 32, 8192, num_kv_heads=32, rotary_base=1.3e5),
    "llama-2-7b": {**_LLAMA_2, **shape(4096, 32, 32, 11008)},
    "llama-2-13b": {**_LLAMA_2, **shape(5120, 40, 40, 13824)},
    "llama-3-8b": {**_LLAMA_3, **_SHAPE_8B},
    "llama-3-70b": {**_LLAMA_3, **_SHAPE_70B},
    "llama-3.1-8b": {**_LLAMA_31, **_SHAPE_8B},
    "llama-3.1-70b": {**_LLAMA_31, **_SHAPE_70B},
    "llama-3.2-1b": {**_LLAMA_32, **shape(2048, 16, 32, 8192)},
    "llama-3.2-3b": {**_LLAMA_32, **shape(3072, 28, 24, 8192)},
    "qwen2-0.5b": {**_QWEN_2, **shape(896, 24, 14, 4864, num_kv_heads=2)},
    "qwen2-1.5b": {**_QWEN_2, **shape(1536, 28, 12, 8960, num_kv_heads=2)},
    "qwen2-7b": {
        **_QWEN_2,
        **shape(3584, 28, 28, 18944, num_kv_heads=4),
        "vocab_size": 152064,
        "max_positions": 131072,
        "tied": False,
    },
    "qwen3-0.6b": {**_QWEN_3, **shape(1024, 28, 16, 3072)},
    "qwen3-1.7b": {**_QWEN_3, **shape(2048, 28, 16, 6144)},
    "qwen3-8b": {**_QWEN_3, **shape(4096, 36, 32, 12288, tied=False)},
    "gemma-2b": {**_GEMMA, **shape(2048, 18, 8, 16384, num_kv_heads=1)},
    "gemma-7b": {**_GEMMA, **shape(3072, 28, 16, 24576, num_kv_heads=16)},
    "gemma-2-2b": {**_GEMMA_2, **shape(2304, 26, 8, 9216, num_kv_heads=4)},
    "gemma-2-9b": {**_GEMMA_2, **shape(3584, 42, 16, 14336, num_kv_heads=8)},
    "gpt2": _gpt_2(768, 12, 12),
    "gpt2-medium": _gpt_2(1024, 24, 16),
    "gpt2-large": _gpt_2(1280, 36, 20),
    "gpt2-xl": _gpt_2(1600, 48, 25),
    "olmoe-1b-7b": {
        **shape(2048, 16, 16, 1024, num_kv_heads=16),
        "vocab_size": 50304,
        "max_positions": 4096,
        "rotary_base": 1e4,
        "qk_norm": "projection",
        "tied": False,
        "num_experts": 64,
        "experts_per_token": 8,
    },
}
