"""T5 and T5 v1.1 as `transformers` stores them."""

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._decoder import HEAD, LazyTensors, scale, weight
from mtl_jax.io.names._encdec import EncDecTable
from mtl_jax.io.names._table import Rule

_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
# Gated layers call their `wi` `wi_1`.
_MLP = {"wi": "in", "wi_0": "gate", "wo": "out"}
_GATE, _GATED, _PLAIN = (f"DenseReluDense.{x}.weight" for x in ("wi_0", "wi_1", "wi"))
_FEED_FORWARD = {
    "relu": (False, "relu"),
    "gelu": (False, "gelu"),
    "gated-gelu": (True, "gelu_tanh"),
    "gated-relu": (True, "relu"),
    "gated-silu": (True, "silu"),
}


def _options(config):
    choose("t5", config, "model_type", {"t5": None}, "t5")
    gated, activation = choose("t5", config, "feed_forward_proj", _FEED_FORWARD, "relu")
    # Version 1.1 neither scales nor ties. Newer files say the former alone and call
    # every model tied; a head that such a file lacks is the embedding.
    tied = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", tied)
    options = take(
        "t5",
        config,
        vocab_size="vocab_size",
        width="d_model",
        head_dim="d_kv",
        mlp_dim="d_ff",
        encoder_depth="num_layers",
        num_heads="num_heads",
        relative_buckets="relative_attention_num_buckets",
    )
    return {
        **options,
        "depth": config.get("num_decoder_layers") or options["encoder_depth"],
        "relative_distance": config.get("relative_attention_max_distance", 128),
        "norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "gated": gated,
        "activation": activation,
        "scale_outputs": scaled,
        "tied": tied and scaled,
    }


def _group(tensors, where):
    readers = {}
    for name in tensors:
        plain = name.replace(_GATED, _PLAIN)
        if plain != name and plain in tensors:
            raise ValueError(f"{where}: twice the same tensor: {plain!r} and {name!r}")
        readers[plain] = lambda name=name: tensors[name]
    return LazyTensors(readers)


def _ungroup(tensors):
    def name_of(name):
        gated = name.replace(_PLAIN, _GATE) in tensors
        return name.replace(_PLAIN, _GATED) if gated else name

    return {name_of(name): leaf for name, leaf in tensors.items()}


def _attention(theirs, ours):
    return [
        rule
        for name, path in _PROJECTIONS.items()
        for rule in weight(f"{theirs}.{name}", f"{ours}/{path}")
    ]


def _side(side, parts):
    """Rows of one stack; `parts` are its branches in order."""
    block, layer = f"{side}.block.{{i}}.layer", f"{side}/layers_{{i}}"
    relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        Rule(relative, f"{side}/relative/embedding"),
        *scale(f"{side}.final_layer_norm", f"{side}/norm"),
    ]
    for number, (theirs, ours) in enumerate(parts.items()):
        rules += scale(f"{block}.{number}.layer_norm", f"{layer}/norm_{ours}")
        if ours == "mlp":
            rules += [
                Rule(rule.name, rule.path, rule.hook, optional=path == "gate")
                for name, path in _MLP.items()
                for rule in weight(
                    f"{block}.{number}.{theirs}.{name}", f"{layer}/mlp/{path}"
                )
            ]
        else:
            rules += _attention(f"{block}.{number}.{theirs}", f"{layer}/{ours}")
    return rules


_ENCODER = {"SelfAttention": "attention", "DenseReluDense": "mlp"}
_DECODER = {
    "SelfAttention": "attention",
    "EncDecAttention": "cross_attention",
    "DenseReluDense": "mlp",
}

t5 = EncDecTable(
    model="encoder-decoder",
    rules=(
        Rule("shared.weight", "embeddings/word/embedding"),
        *_side("encoder", _ENCODER),
        *_side("decoder", _DECODER),
        HEAD,
    ),
    ignore=(r".*\.EncDecAttention\.relative_attention_bias\.weight",),
    options=_options,
    group=_group,
    ungroup=_ungroup,
)
