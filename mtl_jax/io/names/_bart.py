"""BART as `transformers` stores it."""

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._decoder import HEAD
from mtl_jax.io.names._encdec import EncDecTable
from mtl_jax.io.names._table import Hook, Rule, linear, norm

_PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
# Of early configs; what they switch, every BART has one way.
_SWITCHES = {
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
}
_ROW = Hook(lambda x: x[0], lambda x: x[None], 2)


def _options(config):
    choose("bart", config, "model_type", {"bart": None}, "bart")
    for key, value in _SWITCHES.items():
        choose("bart", config, key, {value: None}, value)
    options = take(
        "bart",
        config,
        vocab_size="vocab_size",
        width="d_model",
        encoder_depth="encoder_layers",
        depth="decoder_layers",
        num_heads="encoder_attention_heads",
        mlp_dim="encoder_ffn_dim",
        max_positions="max_position_embeddings",
    )
    equal = {"decoder_attention_heads": "num_heads", "decoder_ffn_dim": "mlp_dim"}
    for key, ours in equal.items():
        choose("bart", config, key, {options[ours]: None}, options[ours])
    return {
        **options,
        "head_dim": None,
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
        "activation": choose(
            "bart", config, "activation_function", _ACTIVATIONS, "gelu"
        ),
        "scale_embeddings": config.get("scale_embedding", False),
        "query_scale": None,
        "tied": choose("bart", config, "tie_word_embeddings", {True: True}, True),
        "head_bias": True,
    }


def _attention(theirs, ours):
    return [
        rule
        for name, path in _PROJECTIONS.items()
        for rule in linear(f"{theirs}.{name}", f"{ours}/{path}")
    ]


def _side(side, attentions):
    """Rows of one stack; `attentions` are {theirs: ours}."""
    outer, layer = f"model.{side}", f"{side}/layers_{{i}}"
    block = f"{outer}.layers.{{i}}"
    rules = [
        Rule(f"{outer}.embed_positions.weight", f"{side}/position/embedding"),
        *norm(f"{outer}.layernorm_embedding", f"{side}/norm_embeddings"),
    ]
    for theirs, ours in attentions.items():
        rules += _attention(f"{block}.{theirs}", f"{layer}/{ours}")
        rules += norm(f"{block}.{theirs}_layer_norm", f"{layer}/norm_{ours}")
    return [
        *rules,
        *linear(f"{block}.fc1", f"{layer}/mlp/in"),
        *linear(f"{block}.fc2", f"{layer}/mlp/out"),
        *norm(f"{block}.final_layer_norm", f"{layer}/norm_mlp"),
    ]


_DECODER = {"self_attn": "attention", "encoder_attn": "cross_attention"}

bart = EncDecTable(
    model="encoder-decoder",
    rules=(
        Rule("model.shared.weight", "embeddings/word/embedding"),
        *_side("encoder", {"self_attn": "attention"}),
        *_side("decoder", _DECODER),
        HEAD,
        Rule("final_logits_bias", "head/bias", _ROW, optional=True),
    ),
    ignore=(r"model\.(encoder|decoder)\.version",),
    options=_options,
    inside="model.",
)
