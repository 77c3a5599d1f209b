"""Backbones, one file each."""

from mtl_jax.models.backbones.bert import Bert
from mtl_jax.models.backbones.mlp import Mlp
from mtl_jax.models.backbones.vit import ViT

__all__ = ["Bert", "Mlp", "ViT"]
