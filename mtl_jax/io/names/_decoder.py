"""What the tables of decoders share: rows, regrouped tensors and config entries."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.typing import DTypeLike

from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._leaves import HostLeaf
from mtl_jax.io.names._table import TRANSPOSE, NameTable, Rule

LAYER = "model.layers.{i}"
# A tied checkpoint may repeat the embedding under this name.
HEAD = Rule("lm_head.weight", "head/kernel", TRANSPOSE, optional=True)
# Checkpoints of the model without its head lack the first part of the name.
BARE = ((r"^(?=(embed_tokens|layers|norm)\.)", "model."),)
BUFFERS = (r".*\.rotary_emb\.inv_freq",)
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_ROPE_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


class LazyTensors(Mapping[str, Any]):
    """Names to functions that read an array when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTable(NameTable):
    """A `NameTable` whose file may hold several of our leaves in one tensor.

    Attributes:
      group: (foreign tensors, what an error begins with) -> tensors as the rules
        name them.
      ungroup: the inverse, on what `NameTable.save` gives.
    """

    group: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    ungroup: Callable[[dict[str, HostLeaf]], dict[str, HostLeaf]] | None = None

    def load(
        self,
        tensors: Mapping[str, Any],
        like: Any = None,
        *,
        dtype: DTypeLike | None = None,
        where: str = "NameTable.load",
    ) -> dict[str, Any]:
        """See `NameTable.load`; given `like`, only the head may be left over."""
        table = self
        if like is not None:  # A bias that the model lacks must not get lost.
            rules = tuple(
                dataclasses.replace(rule, optional=rule.path == HEAD.path)
                for rule in self.rules
            )
            table = dataclasses.replace(self, rules=rules)
        if self.group is not None:
            tensors = self.group(tensors, where)
        return NameTable.load(table, tensors, like, dtype=dtype, where=where)

    def save(self, params: Any) -> dict[str, HostLeaf]:
        """See `NameTable.save`."""
        tensors = super().save(params)
        return tensors if self.ungroup is None else self.ungroup(tensors)


def weight(name: str, path: str, *, bias: bool | None = False) -> tuple[Rule, ...]:
    """A linear layer; `bias` None = the file may have one."""
    rules = (Rule(f"{name}.weight", f"{path}/kernel", TRANSPOSE),)
    if bias is False:
        return rules
    return *rules, Rule(f"{name}.bias", f"{path}/bias", optional=bias is None)


def scale(name: str, path: str) -> tuple[Rule, ...]:
    """An RMS norm."""
    return (Rule(f"{name}.weight", f"{path}/scale"),)


def outside() -> tuple[Rule, ...]:
    """Rows outside the blocks."""
    return (
        Rule("model.embed_tokens.weight", "embeddings/word/embedding"),
        *scale("model.norm", "norm"),
        HEAD,
    )


def attention(
    *, qkv_bias: bool | None = False, out_bias: bool | None = False, norms: bool = False
) -> tuple[Rule, ...]:
    """Rows of the attention."""
    rules = []
    for theirs, ours in _PROJECTIONS.items():
        rules += weight(
            f"{LAYER}.self_attn.{theirs}",
            f"layers_{{i}}/attention/{ours}",
            bias=qkv_bias,
        )
    rules += weight(
        f"{LAYER}.self_attn.o_proj", "layers_{i}/attention/out", bias=out_bias
    )
    if norms:
        rules += scale(f"{LAYER}.self_attn.q_norm", "layers_{i}/attention/norm_query")
        rules += scale(f"{LAYER}.self_attn.k_norm", "layers_{i}/attention/norm_key")
    return tuple(rules)


def gated_mlp(*, bias: bool | None = False) -> tuple[Rule, ...]:
    """Rows of a gated feed-forward layer."""
    names = {"gate_proj": "gate", "up_proj": "in", "down_proj": "out"}
    return tuple(
        rule
        for theirs, ours in names.items()
        for rule in weight(
            f"{LAYER}.mlp.{theirs}", f"layers_{{i}}/mlp/{ours}", bias=bias
        )
    )


def two_norms() -> tuple[Rule, ...]:
    """Rows of the norms in front of attention and feed-forward layer."""
    return (
        *scale(f"{LAYER}.input_layernorm", "layers_{i}/norm_attention"),
        *scale(f"{LAYER}.post_attention_layernorm", "layers_{i}/norm_mlp"),
    )


def base_options(
    table: str, config: Mapping[str, Any], *, tied: bool, types: tuple[str, ...]
) -> dict[str, Any]:
    """Sizes, rotary embedding and head of a Llama-like config.

    Args:
      table: name of the table, for errors.
      config: parsed `config.json`.
      tied: whether the head is tied where the config does not say.
      types: accepted values of `model_type`.

    Returns:
      Options of `models.Decoder`.

    Raises:
      ValueError: for what is missing or not supported.
    """
    choose(table, config, "model_type", dict.fromkeys(types), types[0])
    options = take(
        table,
        config,
        vocab_size="vocab_size",
        width="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        mlp_dim="intermediate_size",
        max_positions="max_position_embeddings",
    )
    return {
        **options,
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", tied),
        **rotary(table, config),
    }


def rotary(table: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` or `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if unknown := sorted(set(rope) - _ROPE_KEYS):
        raise ValueError(
            f"names.{table}: rotary entries {', '.join(unknown)} are not supported"
        )
    for entries in (config, rope):
        choose(table, entries, "partial_rotary_factor", {1: None, None: None}, None)
    base = rope.get("rope_theta", config.get("rope_theta", 1e4))
    kind = rope.get("rope_type", rope.get("type", "default"))
    wanted = choose(
        table,
        {"rope_type": kind},
        "rope_type",
        {
            "default": None,
            "linear": {"factor": "factor"},
            "llama3": {
                "factor": "factor",
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_max_positions": "original_max_position_embeddings",
            },
        },
        "default",
    )
    scaling = wanted and {"type": kind, **take(table, rope, **wanted)}
    return {"rotary_base": float(base), "rotary_scaling": scaling}


def windows(
    table: str, config: Mapping[str, Any], kinds: list[str]
) -> dict[str, tuple[int, ...]]:
    """Attention windows, from `layer_types` or else from `kinds`.

    Returns:
      The shortest cycle that says it for every block.
    """
    kinds = config.get("layer_types") or kinds
    known = {"full_attention": 0, "sliding_attention": config.get("sliding_window")}
    every = tuple(
        choose(table, {"layer_types": kind}, "layer_types", known, None)
        for kind in kinds
    )
    if None in every:
        raise ValueError(f"names.{table}: config lacks sliding_window")
    if len(every) != config["num_hidden_layers"]:
        raise ValueError(
            f"names.{table}: layer_types has {len(every)} entries for "
            f"{config['num_hidden_layers']} layers"
        )
    if not any(every):
        return {"windows": ()}
    for period in range(1, len(every) + 1):
        if all(w == every[i % period] for i, w in enumerate(every)):
            return {"windows": every[:period]}
    return {"windows": every}
