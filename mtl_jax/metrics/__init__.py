"""Metrics: pure, one value per example, and summaries of runs of many tasks."""

from mtl_jax.metrics.classification import accuracy, roc_auc, top_k_accuracy
from mtl_jax.metrics.correlation import spearman
from mtl_jax.metrics.multitask import (
    Conflicts,
    DeltaP,
    conflicts,
    cosine_matrix,
    delta_m,
    delta_p,
)
from mtl_jax.metrics.ranking import ndcg

__all__ = [
    "Conflicts",
    "DeltaP",
    "accuracy",
    "conflicts",
    "cosine_matrix",
    "delta_m",
    "delta_p",
    "ndcg",
    "roc_auc",
    "spearman",
    "top_k_accuracy",
]
