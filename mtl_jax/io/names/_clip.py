"""CLIP and its towers as the `transformers` CLIP classes store them."""

import dataclasses

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._table import (
    TRANSPOSE,
    NameTable,
    Rule,
    linear,
    norm,
    patch_kernel,
)


def _tower(table, config, kind):
    """Options that both towers have, of a whole config or that of one tower.

    `projection` is set only where the architecture is known to have the map; a bare
    tower has none.
    """
    take(table, config)  # Of the whole, nothing but what no table supports.
    tower = config.get(f"{kind}_config", config)
    bare = config.get("architectures") in (None, [], [f"CLIP{kind.title()}Model"])
    projected = config is not tower or not bare
    return tower, {
        **take(
            table,
            tower,
            width="hidden_size",
            depth="num_hidden_layers",
            num_heads="num_attention_heads",
            mlp_dim="intermediate_size",
        ),
        "projection": config.get("projection_dim", 512) if projected else None,
        "activation": choose(table, tower, "hidden_act", _ACTIVATIONS, "quick_gelu"),
        "norm_eps": tower.get("layer_norm_eps", 1e-5),
    }


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def _vision_options(config):
    tower, options = _tower("clip_vision", config, "vision")
    return {
        **take("clip_vision", tower, image_size="image_size", patch_size="patch_size"),
        **options,
        "norm_pre": True,
        "patch_bias": False,
    }


def _text_options(config):
    tower, options = _tower("clip_text", config, "text")
    end = tower.get("eos_token_id", 49407)
    if type(end) is not int:
        raise ValueError(
            f"names.clip_text: eos_token_id={end!r} is not supported, only a number"
        )
    return {
        **take(
            "clip_text",
            tower,
            vocab_size="vocab_size",
            max_positions="max_position_embeddings",
        ),
        **options,
        # Configs of the first checkpoints have a wrong number here, 2; their features
        # are those of the highest number in a text.
        "end_token": None if end == 2 else end,
    }


def _options(config):
    for kind in ("vision_config", "text_config"):
        if not isinstance(config.get(kind), dict):
            raise ValueError(f"names.clip: config lacks {kind}")
    return {
        "vision_options": _vision_options(config),
        "text_options": _text_options(config),
    }


def _blocks(layer):
    return (
        *linear(f"{layer}.self_attn.q_proj", "layers_{i}/attention/query"),
        *linear(f"{layer}.self_attn.k_proj", "layers_{i}/attention/key"),
        *linear(f"{layer}.self_attn.v_proj", "layers_{i}/attention/value"),
        *linear(f"{layer}.self_attn.out_proj", "layers_{i}/attention/out"),
        *norm(f"{layer}.layer_norm1", "layers_{i}/norm_attention"),
        *linear(f"{layer}.mlp.fc1", "layers_{i}/mlp/in"),
        *linear(f"{layer}.mlp.fc2", "layers_{i}/mlp/out"),
        *norm(f"{layer}.layer_norm2", "layers_{i}/norm_mlp"),
    )


def _projection(name):
    return Rule(f"{name}.weight", "projection/kernel", TRANSPOSE, optional=True)


def _inside(tower, table):
    """The rules of a tower for a tree that holds it under a name, all needed."""
    return tuple(
        dataclasses.replace(rule, path=f"{tower}/{rule.path}", optional=False)
        for rule in table.rules
    )


_POSITIONS = r".*\.position_ids"

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
        *_blocks("vision_model.encoder.layers.{i}"),
        *norm("vision_model.post_layernorm", "norm_post"),
        _projection("visual_projection"),
    ),
    aliases=(
        (r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),
    ),
    ignore=(
        _POSITIONS,
        r"text_model\..*",
        r"text_projection\..*",
        r"logit_scale",
        r"classifier\..*",
    ),
    options=_vision_options,
)

clip_text = NameTable(
    model="clip-text",
    rules=(
        Rule(
            "text_model.embeddings.token_embedding.weight", "embeddings/word/embedding"
        ),
        Rule(
            "text_model.embeddings.position_embedding.weight",
            "embeddings/position/embedding",
        ),
        *_blocks("text_model.encoder.layers.{i}"),
        *norm("text_model.final_layer_norm", "norm_post"),
        _projection("text_projection"),
    ),
    aliases=((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),),
    ignore=(
        _POSITIONS,
        r"vision_model\..*",
        r"visual_projection\..*",
        r"logit_scale",
    ),
    options=_text_options,
)

clip = NameTable(
    model="clip",
    rules=(
        Rule("logit_scale", "logit_scale"),
        *_inside("vision", clip_vision),
        *_inside("text", clip_text),
    ),
    ignore=(_POSITIONS,),
    options=_options,
)
