"""Llama-like decoders as GGUF files store them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.io.names._table import TRANSPOSE, Hook, NameTable, Rule

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_LAYER = "blk.{i}"
_EPSILON = "attention.layer_norm_rms_epsilon"
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
}
# Metadata of the architecture that is understood; anything else is refused, since it
# may change what the model computes.
_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    _EPSILON,
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
}


def rotary_rows(heads: int, *, bias: bool = False) -> Hook:
    """A query or key projection whose rows GGUF's llama layout reorders.

    Rotation acts on the pairs (j, j + d / 2) of a head here and in other checkpoints.
    This layout stores the rows of a pair next to each other: (2 j, 2 j + 1).

    Args:
      heads: number of heads of the projection.
      bias: for its bias [out] instead of its weight [out, in].
    """

    def split(x, inner):
        if x.shape[0] % (2 * heads):
            raise ValueError(f"its rows do not split into {heads} heads of pairs")
        half = x.shape[0] // heads // 2
        axes = (2, half) if inner else (half, 2)
        return x.reshape(heads, *axes, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    if bias:
        return Hook(lambda x: split(x, False), lambda x: split(x, True), 1)
    return Hook(lambda x: split(x, False).T, lambda x: split(x.T, True), 2)


def gguf_llama(
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    rope_factors: np.ndarray | None = None,
) -> NameTable:
    """The layout of one file: it depends on the number of heads.

    Args:
      metadata: of the file; `general.architecture` is "llama" (Llama 2 and 3,
        Mistral, SmolLM), "qwen2" or "qwen3".
      tied: whether the head is the embedding, so that there is no `output.weight`.
      rope_factors: the tensor `rope_freqs.weight`, where there is one: what the
        rotary frequencies of Llama 3 are divided by.

    Returns:
      A table for `load` and `save`; its `options(metadata)` are those of
      `models.build("decoder")`.

    Raises:
      ValueError: for another architecture, or metadata that the decoder cannot
        express.
    """
    options = _options(metadata, tied, rope_factors)
    architecture = metadata["general.architecture"]
    permuted = architecture == "llama"

    def projection(name, path, heads=None):
        weight = rotary_rows(heads) if permuted and heads else TRANSPOSE
        yield Rule(f"{_LAYER}.{name}.weight", f"layers_{{i}}/{path}/kernel", weight)
        if architecture == "qwen2" and name != "attn_output":
            yield Rule(f"{_LAYER}.{name}.bias", f"layers_{{i}}/{path}/bias")

    rules = [
        Rule("token_embd.weight", "embeddings/word/embedding"),
        *projection("attn_q", "attention/query", options["num_heads"]),
        *projection("attn_k", "attention/key", options["num_kv_heads"]),
        *projection("attn_v", "attention/value"),
        *projection("attn_output", "attention/out"),
        Rule(f"{_LAYER}.ffn_gate.weight", "layers_{i}/mlp/gate/kernel", TRANSPOSE),
        Rule(f"{_LAYER}.ffn_up.weight", "layers_{i}/mlp/in/kernel", TRANSPOSE),
        Rule(f"{_LAYER}.ffn_down.weight", "layers_{i}/mlp/out/kernel", TRANSPOSE),
        Rule(f"{_LAYER}.attn_norm.weight", "layers_{i}/norm_attention/scale"),
        Rule(f"{_LAYER}.ffn_norm.weight", "layers_{i}/norm_mlp/scale"),
        Rule("output_norm.weight", "norm/scale"),
    ]
    if architecture == "qwen3":
        for name, path in (("q", "query"), ("k", "key")):
            rules.append(
                Rule(
                    f"{_LAYER}.attn_{name}_norm.weight",
                    f"layers_{{i}}/attention/norm_{path}/scale",
                )
            )
    if not tied:
        rules.append(Rule("output.weight", "head/kernel", TRANSPOSE))
    return NameTable(
        model="decoder",
        rules=tuple(rules),
        ignore=(r"rope_freqs\.weight",),
        options=lambda config: _options(config, tied, rope_factors),
    )


def _options(metadata, tied, rope_factors):
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ValueError(
            f"names.gguf_llama: general.architecture={architecture!r} is not "
            f"supported, only {', '.join(map(repr, _ARCHITECTURES))}"
        )
    config = _Config(metadata, architecture)
    config.require("expert_count", 0, default=0)
    heads, width = config.take("attention.head_count"), config.take("embedding_length")
    if "attention.key_length" not in config.values and width % heads:
        raise ValueError(f"names.gguf_llama: {heads} heads do not split width {width}")
    head_dim = config.take("attention.key_length", width // heads)
    config.require("attention.value_length", head_dim, default=head_dim)
    config.require("rope.dimension_count", head_dim, default=head_dim)
    tokens = metadata.get("tokenizer.ggml.tokens")
    base = float(config.take("rope.freq_base", 10_000.0, kind=int | float))
    return {
        "vocab_size": config.take(
            "vocab_size", len(tokens) if isinstance(tokens, list) else None
        ),
        "width": width,
        "depth": config.take("block_count"),
        "num_heads": heads,
        "num_kv_heads": config.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_dim": config.take("feed_forward_length"),
        "max_positions": config.take("context_length"),
        # Stored as float32: the shortest decimal that means it is what was meant.
        "norm_eps": float(str(np.float32(config.take(_EPSILON, kind=float)))),
        "rotary_base": base,
        "rotary_scaling": _scaling(config, rope_factors, head_dim, base),
        "qkv_bias": architecture == "qwen2",
        "qk_norm": "head" if architecture == "qwen3" else None,
        "tied": tied,
    }


class _Config:
    """Metadata of the architecture, read strictly."""

    def __init__(self, metadata, architecture):
        self.prefix = f"{architecture}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in metadata.items()
            if key.startswith(self.prefix)
        }
        if unknown := sorted(set(self.values) - _KEYS):
            raise self.refusal(unknown[0])

    def refusal(self, key, hint=""):
        return ValueError(
            f"names.gguf_llama: {self.prefix}{key}={self.values.get(key)!r} is not "
            f"supported{hint}"
        )

    def take(self, key, default=None, kind=int):
        """A positive number, a whole one by default."""
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"names.gguf_llama: metadata lacks {self.prefix}{key}")
        plain = isinstance(value, kind) and not isinstance(value, bool)
        if not plain or not 0 < value < float("inf"):
            raise self.refusal(key, ", only one positive number for all layers")
        return value

    def require(self, key, wanted, *, default):
        found = self.values.get(key, default)
        if not isinstance(found, int | float | str) or found != wanted:
            raise self.refusal(key, f", only {wanted}")


def _scaling(config, factors, head_dim, base):
    """Stretched frequencies, as metadata or a tensor of divisors states them."""
    kind = config.values.get("rope.scaling.type", "none")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise config.refusal("rope.scaling.type", ", only 'none' and 'linear'")
    if factors is None or (np.asarray(factors) == 1).all():
        if kind == "none":
            return None
        factor = config.take("rope.scaling.factor", kind=int | float)
        return {"type": "linear", "factor": float(factor)}
    factors = np.asarray(factors, np.float64)
    factor = round(float(factors.max()), 4)
    # Only the divisors are in the file: the ends of Llama 3's blend are published.
    turns = _LLAMA3["original_max_positions"] / (2 * np.pi)
    turns = turns * base ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    wanted = 1 / (keep + (1 - keep) / factor)
    fits = factors.shape == wanted.shape and np.allclose(factors, wanted, rtol=1e-3)
    if kind != "none" or not fits:
        raise ValueError(
            "names.gguf_llama: rope_freqs.weight is not the scaling of Llama 3, "
            "which is the only one supported"
        )
    return {"type": "llama3", "factor": factor, **_LLAMA3}
