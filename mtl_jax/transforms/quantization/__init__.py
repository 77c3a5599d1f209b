"""Parameters in few bits: codes with scales, decoded where they are used."""

from mtl_jax.transforms.quantization import nf4

__all__ = ["nf4"]
