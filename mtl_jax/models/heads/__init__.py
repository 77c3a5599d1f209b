"""Heads: features to predictions."""

from mtl_jax.models.heads.classifier import Classifier
from mtl_jax.models.heads.pooling import mean_pool
from mtl_jax.models.heads.prototype import l2_normalize, prototype_logits

__all__ = ["Classifier", "l2_normalize", "mean_pool", "prototype_logits"]
