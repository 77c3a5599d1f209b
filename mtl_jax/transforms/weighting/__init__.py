"""Task weighting by losses alone: T losses in, one scalar out.

Every method is a `Weighting` of three pure functions, `init`, `loss` and `update`;
what it learns is an ordinary tree of parameters, and its history an explicit state.
"""

from mtl_jax.transforms.weighting._aggregator import (
    AsAggregatorState,
    Before,
    as_aggregator,
)
from mtl_jax.transforms.weighting._base import Weighting, WeightingState, from_loss
from mtl_jax.transforms.weighting._cosmos import cosmos
from mtl_jax.transforms.weighting._dwa import DwaState, dwa
from mtl_jax.transforms.weighting._famo import FamoState, famo
from mtl_jax.transforms.weighting._geometric_mean import geometric_mean
from mtl_jax.transforms.weighting._grad_norm import GradNormState, grad_norm
from mtl_jax.transforms.weighting._imtl_l import imtl_l
from mtl_jax.transforms.weighting._linear import constant, mean, sum
from mtl_jax.transforms.weighting._pbi import pbi
from mtl_jax.transforms.weighting._random import random
from mtl_jax.transforms.weighting._stch import StchState, stch
from mtl_jax.transforms.weighting._uncertainty import uncertainty

__all__ = [
    "AsAggregatorState",
    "Before",
    "DwaState",
    "FamoState",
    "GradNormState",
    "StchState",
    "Weighting",
    "WeightingState",
    "as_aggregator",
    "constant",
    "cosmos",
    "dwa",
    "famo",
    "from_loss",
    "geometric_mean",
    "grad_norm",
    "imtl_l",
    "mean",
    "pbi",
    "random",
    "stch",
    "sum",
    "uncertainty",
]
