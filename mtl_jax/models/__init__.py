"""Flax Linen models: layers, backbones and heads.

`params` is always the plain nested dict under "params"; `functional` turns a module
into the `apply_fn(params, *inputs)` that every transform takes.
"""

from mtl_jax.models import heads, layers, multitask
from mtl_jax.models.adapted import apply_adapted
from mtl_jax.models.backbones import (
    Bert,
    Clip,
    ClipText,
    ConvStage,
    Decoder,
    EncoderDecoder,
    Mlp,
    SentenceEncoder,
    SmallConv,
    ViT,
    shift_right,
)
from mtl_jax.models.captures import input_grams
from mtl_jax.models.expert_assembly import assemble_experts, prompt_gates
from mtl_jax.models.expert_pruning import (
    PrunedExperts,
    prune_experts,
    skip_ratio,
    take_experts,
)
from mtl_jax.models.functional import functional
from mtl_jax.models.heads import Classifier, mean_pool, prototype_logits, zero_shot_head
from mtl_jax.models.layers import (
    init_cache,
    reorder_cache,
    stack_layers,
    unstack_layers,
)
from mtl_jax.models.loads import smile_loads
from mtl_jax.models.registry import build, names, sharding_rules
from mtl_jax.models.routed import apply_routed, apply_smile

__all__ = [
    "Bert",
    "Classifier",
    "Clip",
    "ClipText",
    "ConvStage",
    "Decoder",
    "EncoderDecoder",
    "Mlp",
    "PrunedExperts",
    "SentenceEncoder",
    "SmallConv",
    "ViT",
    "apply_adapted",
    "apply_routed",
    "apply_smile",
    "assemble_experts",
    "build",
    "functional",
    "heads",
    "init_cache",
    "input_grams",
    "layers",
    "mean_pool",
    "multitask",
    "names",
    "prompt_gates",
    "prototype_logits",
    "prune_experts",
    "reorder_cache",
    "sharding_rules",
    "shift_right",
    "skip_ratio",
    "smile_loads",
    "stack_layers",
    "take_experts",
    "unstack_layers",
    "zero_shot_head",
]
