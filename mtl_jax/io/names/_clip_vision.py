"""The image tower of CLIP as the `transformers` CLIP classes store it."""

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._table import (
    TRANSPOSE,
    NameTable,
    Rule,
    linear,
    norm,
    patch_kernel,
)

_LAYER = "vision_model.encoder.layers.{i}"


def _options(config):
    """A whole CLIP config or that of its image tower.

    `projection` is set only where the architecture is known to have the map; a bare
    image tower has none.
    """
    tower = config.get("vision_config", config)
    bare = config.get("architectures") in (None, [], ["CLIPVisionModel"])
    projected = config is not tower or not bare
    return {
        **take(
            "clip_vision",
            tower,
            image_size="image_size",
            patch_size="patch_size",
            width="hidden_size",
            depth="num_hidden_layers",
            num_heads="num_attention_heads",
            mlp_dim="intermediate_size",
        ),
        "projection": config.get("projection_dim", 512) if projected else None,
        "activation": choose(
            "clip_vision",
            tower,
            "hidden_act",
            {"quick_gelu": "quick_gelu", "gelu": "gelu"},
            "quick_gelu",
        ),
        "norm_eps": tower.get("layer_norm_eps", 1e-5),
        "norm_pre": True,
        "patch_bias": False,
    }


clip_vision = NameTable(
    model="vit",
    rules=(
        Rule("vision_model.embeddings.class_embedding", "cls_token"),
        Rule("vision_model.embeddings.position_embedding.weight", "position_embedding"),
        Rule(
            "vision_model.embeddings.patch_embedding.weight",
            "patch_embed/kernel",
            patch_kernel(),
        ),
        # The misspelling is in every checkpoint.
        *norm("vision_model.pre_layrnorm", "norm_pre"),
        *linear(f"{_LAYER}.self_attn.q_proj", "layers_{i}/attention/query"),
        *linear(f"{_LAYER}.self_attn.k_proj", "layers_{i}/attention/key"),
        *linear(f"{_LAYER}.self_attn.v_proj", "layers_{i}/attention/value"),
        *linear(f"{_LAYER}.self_attn.out_proj", "layers_{i}/attention/out"),
        *norm(f"{_LAYER}.layer_norm1", "layers_{i}/norm_attention"),
        *linear(f"{_LAYER}.mlp.fc1", "layers_{i}/mlp/in"),
        *linear(f"{_LAYER}.mlp.fc2", "layers_{i}/mlp/out"),
        *norm(f"{_LAYER}.layer_norm2", "layers_{i}/norm_mlp"),
        *norm("vision_model.post_layernorm", "norm_post"),
        Rule("visual_projection.weight", "projection/kernel", TRANSPOSE, optional=True),
    ),
    aliases=(
        (r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),
    ),
    ignore=(
        r".*\.position_ids",
        r"text_model\..*",
        r"text_projection\..*",
        r"logit_scale",
        r"classifier\..*",
    ),
    options=_options,
)
