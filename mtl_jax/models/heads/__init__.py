"""Heads: features to predictions."""

from mtl_jax.models.heads.classifier import Classifier
from mtl_jax.models.heads.pooling import mean_pool
from mtl_jax.models.heads.prototype import l2_normalize, prototype_logits
from mtl_jax.models.heads.zero_shot import fill_templates, zero_shot_head

__all__ = [
    "Classifier",
    "fill_templates",
    "l2_normalize",
    "mean_pool",
    "prototype_logits",
    "zero_shot_head",
]
