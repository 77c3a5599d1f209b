"""Tangent-space models: Taylor-1 apply functions, NTK products, disentanglement."""

from mtl_jax.transforms.linearize._disentanglement import (
    disentanglement_error,
    nonlinear_advantage,
)
from mtl_jax.transforms.linearize._localisation import (
    Localisation,
    kernel_localisation,
    ntk_localisation,
)
from mtl_jax.transforms.linearize._ntk import empirical_ntk, ntk_vector_product
from mtl_jax.transforms.linearize._taylor import (
    scale_sweep,
    task_outputs,
    taylor1,
    taylor1_delta,
)

__all__ = [
    "Localisation",
    "disentanglement_error",
    "empirical_ntk",
    "kernel_localisation",
    "nonlinear_advantage",
    "ntk_localisation",
    "ntk_vector_product",
    "scale_sweep",
    "task_outputs",
    "taylor1",
    "taylor1_delta",
]
