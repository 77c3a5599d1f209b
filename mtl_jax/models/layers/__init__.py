"""Layers that the backbones share."""

from mtl_jax.models.layers.attention import SelfAttention, attend, mask_bias
from mtl_jax.models.layers.feed_forward import (
    ACTIVATIONS,
    FeedForward,
    activation,
    quick_gelu,
)
from mtl_jax.models.layers.norm import LayerNorm
from mtl_jax.models.layers.sharding import BLOCK_RULES
from mtl_jax.models.layers.stack import run_stack, stack_layers, unstack_layers

__all__ = [
    "ACTIVATIONS",
    "BLOCK_RULES",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "activation",
    "attend",
    "mask_bias",
    "quick_gelu",
    "run_stack",
    "stack_layers",
    "unstack_layers",
]
