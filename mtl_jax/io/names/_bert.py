"""BERT as `transformers.BertModel` and sentence-transformers store it."""

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._table import NameTable, Rule, linear, norm

_LAYER = "encoder.layer.{i}"


def _options(config):
    choose("bert", config, "position_embedding_type", {"absolute": None}, "absolute")
    return {
        **take(
            "bert",
            config,
            vocab_size="vocab_size",
            width="hidden_size",
            depth="num_hidden_layers",
            num_heads="num_attention_heads",
            mlp_dim="intermediate_size",
            max_positions="max_position_embeddings",
            num_token_types="type_vocab_size",
        ),
        "activation": choose("bert", config, "hidden_act", _ACTIVATIONS, "gelu"),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "dropout": config.get("hidden_dropout_prob", 0.1),
    }


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

bert = NameTable(
    model="bert",
    rules=(
        Rule("embeddings.word_embeddings.weight", "embeddings/word/embedding"),
        Rule("embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        Rule(
            "embeddings.token_type_embeddings.weight",
            "embeddings/token_type/embedding",
        ),
        *norm("embeddings.LayerNorm", "embeddings/norm"),
        *linear(f"{_LAYER}.attention.self.query", "layers_{i}/attention/query"),
        *linear(f"{_LAYER}.attention.self.key", "layers_{i}/attention/key"),
        *linear(f"{_LAYER}.attention.self.value", "layers_{i}/attention/value"),
        *linear(f"{_LAYER}.attention.output.dense", "layers_{i}/attention/out"),
        *norm(f"{_LAYER}.attention.output.LayerNorm", "layers_{i}/norm_attention"),
        *linear(f"{_LAYER}.intermediate.dense", "layers_{i}/mlp/in"),
        *linear(f"{_LAYER}.output.dense", "layers_{i}/mlp/out"),
        *norm(f"{_LAYER}.output.LayerNorm", "layers_{i}/norm_mlp"),
    ),
    aliases=(
        (r"^bert\.", ""),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    ignore=(
        r"embeddings\.(position|token_type)_ids",
        r"pooler\..*",
        r"cls\..*",
        r"classifier\..*",
        r"qa_outputs\..*",
    ),
    options=_options,
)
