"""Adapters: small trees beside the parameters, merged into them or read by layers."""

from mtl_jax.transforms.adapters import lora

__all__ = ["lora"]
