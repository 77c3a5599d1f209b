"""OLMoE as `transformers` stores it, one tensor per expert."""

import re

import numpy as np

from mtl_jax.io.names import _decoder
from mtl_jax.io.names._config import choose, take
from mtl_jax.io.names._leaves import HostLeaf
from mtl_jax.io.names._table import Hook, Rule

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+_proj\.weight)")
_STACK = re.compile(r"(.*\.mlp\.experts)\.(\w+_proj\.weight)")


def _swap(x):
    return np.swapaxes(x, -1, -2)


def _options(config):
    choose("olmoe", config, "clip_qkv", {None: None}, None)
    choose("olmoe", config, "attention_bias", {False: None}, False)
    return {
        **_decoder.base_options("olmoe", config, tied=False, types=("olmoe",)),
        **take(
            "olmoe",
            config,
            num_experts="num_experts",
            experts_per_token="num_experts_per_tok",
        ),
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "normalize_experts": config.get("norm_topk_prob", False),
        "activation": choose("olmoe", config, "hidden_act", {"silu": "silu"}, "silu"),
        "qk_norm": "projection",
    }


def _group(tensors, where):
    """Stacks the experts of every layer."""
    readers, stacks = {}, {}
    for name in tensors:
        if match := _EXPERT.fullmatch(name):
            stack = stacks.setdefault(f"{match[1]}.{match[3]}", {})
            stack[int(match[2])] = name
        else:
            readers[name] = lambda name=name: tensors[name]
    for whole, names in stacks.items():
        if sorted(names) != list(range(len(names))):
            numbers = ", ".join(map(str, sorted(names)))
            raise ValueError(f"{where}: experts of {whole!r} have a gap: {numbers}")
        readers[whole] = lambda names=names: np.stack(
            [tensors[names[e]] for e in range(len(names))]
        )
    return _decoder.LazyTensors(readers)


def _ungroup(tensors):
    out, last = {}, {}

    def expert(name, leaf, e):
        if name not in last:  # Experts are written one after the other.
            last.clear()
            last[name] = leaf.read()
        return last[name][e]

    for name, leaf in tensors.items():
        if match := _STACK.fullmatch(name):
            for e in range(leaf.shape[0]):
                out[f"{match[1]}.{e}.{match[2]}"] = HostLeaf(
                    leaf.shape[1:],
                    leaf.dtype,
                    lambda name=name, leaf=leaf, e=e: expert(name, leaf, e),
                )
        else:
            out[name] = leaf
    return out


_LAYER = _decoder.LAYER
_EXPERTS = {"gate_proj": "gate", "up_proj": "in", "down_proj": "out"}

olmoe = _decoder.DecoderTable(
    model="decoder",
    rules=(
        *_decoder.outside(),
        *_decoder.attention(norms=True),
        *_decoder.two_norms(),
        *_decoder.weight(f"{_LAYER}.mlp.gate", "layers_{i}/mlp/router"),
        *(
            Rule(
                f"{_LAYER}.mlp.experts.{theirs}.weight",
                f"layers_{{i}}/mlp/experts/{ours}/kernel",
                Hook(_swap, _swap, 3),
            )
            for theirs, ours in _EXPERTS.items()
        ),
    ),
    aliases=_decoder.BARE,
    ignore=_decoder.BUFFERS,
    options=_options,
    group=_group,
    ungroup=_ungroup,
)
