"""Metrics: pure, one value per example, no hidden reduction."""

from mtl_jax.metrics.classification import accuracy, top_k_accuracy

__all__ = ["accuracy", "top_k_accuracy"]
