"""Multi-task architectures over any backbone, with a named shared representation."""

from mtl_jax.models.multitask.base import (
    SHARDING_RULES,
    MultiTaskModule,
    TaskHead,
)
from mtl_jax.models.multitask.cgc import CGC, PLE
from mtl_jax.models.multitask.cross_stitch import CrossStitch
from mtl_jax.models.multitask.gates import (
    DSelectK,
    MMoE,
    SoftGate,
    SparseGate,
    smooth_step,
)
from mtl_jax.models.multitask.hard_sharing import HardSharing
from mtl_jax.models.multitask.ltb import LTB
from mtl_jax.models.multitask.mtan import MTAN

__all__ = [
    "CGC",
    "LTB",
    "MTAN",
    "PLE",
    "SHARDING_RULES",
    "CrossStitch",
    "DSelectK",
    "HardSharing",
    "MMoE",
    "MultiTaskModule",
    "SoftGate",
    "SparseGate",
    "TaskHead",
    "smooth_step",
]
