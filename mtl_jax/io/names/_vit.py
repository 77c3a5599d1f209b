"""ViT as `transformers.ViTModel` stores it."""

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._table import (
    LEADING_1,
    LEADING_1_1,
    NameTable,
    Rule,
    linear,
    norm,
    patch_kernel,
)

_LAYER = "encoder.layer.{i}"


def _options(config):
    choose("vit", config, "qkv_bias", {True: None}, True)
    return {
        **take(
            "vit",
            config,
            image_size="image_size",
            patch_size="patch_size",
            width="hidden_size",
            depth="num_hidden_layers",
            num_heads="num_attention_heads",
            mlp_dim="intermediate_size",
        ),
        "activation": choose(
            "vit",
            config,
            "hidden_act",
            {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
            "gelu",
        ),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "dropout": config.get("hidden_dropout_prob", 0.0),
    }


vit = NameTable(
    model="vit",
    rules=(
        Rule("embeddings.cls_token", "cls_token", LEADING_1_1),
        Rule("embeddings.position_embeddings", "position_embedding", LEADING_1),
        Rule(
            "embeddings.patch_embeddings.projection.weight",
            "patch_embed/kernel",
            patch_kernel(),
        ),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embed/bias"),
        *linear(f"{_LAYER}.attention.attention.query", "layers_{i}/attention/query"),
        *linear(f"{_LAYER}.attention.attention.key", "layers_{i}/attention/key"),
        *linear(f"{_LAYER}.attention.attention.value", "layers_{i}/attention/value"),
        *linear(f"{_LAYER}.attention.output.dense", "layers_{i}/attention/out"),
        *norm(f"{_LAYER}.layernorm_before", "layers_{i}/norm_attention"),
        *linear(f"{_LAYER}.intermediate.dense", "layers_{i}/mlp/in"),
        *linear(f"{_LAYER}.output.dense", "layers_{i}/mlp/out"),
        *norm(f"{_LAYER}.layernorm_after", "layers_{i}/norm_mlp"),
        *norm("layernorm", "norm_post"),
    ),
    aliases=((r"^vit\.", ""),),
    ignore=(
        r"embeddings\.mask_token",
        r"pooler\..*",
        r"classifier\..*",
        r"decoder\..*",
    ),
    options=_options,
)
