"""Losses: pure, one value per example, no hidden reduction."""

from mtl_jax.losses.classification import (
    kl_divergence,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    softmax_entropy,
)
from mtl_jax.losses.regression import absolute_error, huber, squared_error

__all__ = [
    "absolute_error",
    "huber",
    "kl_divergence",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "softmax_entropy",
    "squared_error",
]
