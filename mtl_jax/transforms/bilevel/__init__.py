"""Task weights learned on held-out data, one level above the model.

Every method is a `Bilevel`: `update(params, state, train_batch, valid_batch)` moves the
weights and gives the model's optimizer its gradient.
"""

from mtl_jax.transforms.bilevel._auto_lambda import (
    auto_lambda,
    auto_lambda_hypergradient,
)
from mtl_jax.transforms.bilevel._base import (
    AsAggregator,
    Bilevel,
    BilevelInfo,
    BilevelState,
    as_aggregator,
    sgd_path,
)
from mtl_jax.transforms.bilevel._forum import (
    ForumWeights,
    forum,
    forum_multiplier,
    forum_weights,
)
from mtl_jax.transforms.bilevel._moml import moml, moml_hypergradients

__all__ = [
    "AsAggregator",
    "Bilevel",
    "BilevelInfo",
    "BilevelState",
    "ForumWeights",
    "as_aggregator",
    "auto_lambda",
    "auto_lambda_hypergradient",
    "forum",
    "forum_multiplier",
    "forum_weights",
    "moml",
    "moml_hypergradients",
    "sgd_path",
]
