"""Layers that the backbones share."""

from mtl_jax.models.layers.attention import (
    SelfAttention,
    attend,
    causal_bias,
    mask_bias,
)
from mtl_jax.models.layers.cache import init_cache, reorder_cache
from mtl_jax.models.layers.causal_attention import (
    CausalSelfAttention,
    grouped_attend,
    look_around,
    restarts,
)
from mtl_jax.models.layers.cross_attention import CrossAttention
from mtl_jax.models.layers.encoder_block import PreNormBlock
from mtl_jax.models.layers.feed_forward import (
    ACTIVATIONS,
    FeedForward,
    GatedFeedForward,
    activation,
    quick_gelu,
)
from mtl_jax.models.layers.moe import MixtureOfExperts, apply_experts
from mtl_jax.models.layers.norm import LayerNorm, RmsNorm
from mtl_jax.models.layers.relative_bias import RelativeBias, distance_buckets
from mtl_jax.models.layers.remat import keep_product, rematerialised
from mtl_jax.models.layers.rotary import rotary_frequencies
from mtl_jax.models.layers.sharding import BLOCK_RULES
from mtl_jax.models.layers.stack import (
    run_layers,
    run_stack,
    stack_layers,
    unstack_layers,
)

__all__ = [
    "ACTIVATIONS",
    "BLOCK_RULES",
    "CausalSelfAttention",
    "CrossAttention",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MixtureOfExperts",
    "PreNormBlock",
    "RelativeBias",
    "RmsNorm",
    "SelfAttention",
    "activation",
    "apply_experts",
    "attend",
    "causal_bias",
    "distance_buckets",
    "grouped_attend",
    "init_cache",
    "keep_product",
    "look_around",
    "mask_bias",
    "quick_gelu",
    "rematerialised",
    "reorder_cache",
    "restarts",
    "rotary_frequencies",
    "run_layers",
    "run_stack",
    "stack_layers",
    "unstack_layers",
]
