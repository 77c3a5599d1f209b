"""Losses: pure, one value per example, no hidden reduction."""

from mtl_jax.losses.classification import (
    kl_divergence,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    softmax_entropy,
)
from mtl_jax.losses.consistency import fixmatch, trusted
from mtl_jax.losses.contrastive import infonce
from mtl_jax.losses.language import (
    next_tokens,
    segment_means,
    token_cross_entropy,
    weighted_mean,
)
from mtl_jax.losses.regression import absolute_error, huber, squared_error
from mtl_jax.losses.saliency import (
    csa_loss,
    rep_mtl_loss,
    task_saliency,
    tsr_loss,
)

__all__ = [
    "absolute_error",
    "csa_loss",
    "fixmatch",
    "huber",
    "infonce",
    "kl_divergence",
    "next_tokens",
    "rep_mtl_loss",
    "segment_means",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "softmax_entropy",
    "squared_error",
    "task_saliency",
    "token_cross_entropy",
    "trusted",
    "tsr_loss",
    "weighted_mean",
]
