"""Gradient surgery: many task gradients in, one update out.

Every method is an optax transformation from trees with leaves [T, ...] to trees with
leaves [...]; the methods that look at inner products only have their core in
`aggregation.weights`, a pure function of the Gramian.
"""

from mtl_jax.transforms.aggregation import weights
from mtl_jax.transforms.aggregation._base import (
    AggregationState,
    Aggregator,
    Rule,
    from_gradients,
    from_gramian,
)
from mtl_jax.transforms.aggregation._linear import mean, sum
from mtl_jax.transforms.aggregation._pcgrad import pcgrad

__all__ = [
    "AggregationState",
    "Aggregator",
    "Rule",
    "from_gradients",
    "from_gramian",
    "mean",
    "pcgrad",
    "sum",
    "weights",
]
