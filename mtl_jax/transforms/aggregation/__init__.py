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
from mtl_jax.transforms.aggregation._engines import (
    gram_and_pullback,
    has_transpose,
    task_gramian,
    task_rows,
    task_vjp,
    unscatter,
    value_and_combined_grad,
    value_and_gramian,
    value_and_scattered_grads,
    value_and_task_grads,
)
from mtl_jax.transforms.aggregation._features import (
    SplitLoss,
    value_and_feature_grads,
)
from mtl_jax.transforms.aggregation._linear import mean, sum
from mtl_jax.transforms.aggregation._pcgrad import pcgrad

__all__ = [
    "AggregationState",
    "Aggregator",
    "Rule",
    "SplitLoss",
    "from_gradients",
    "from_gramian",
    "gram_and_pullback",
    "has_transpose",
    "mean",
    "pcgrad",
    "sum",
    "task_gramian",
    "task_rows",
    "task_vjp",
    "unscatter",
    "value_and_combined_grad",
    "value_and_feature_grads",
    "value_and_gramian",
    "value_and_scattered_grads",
    "value_and_task_grads",
    "weights",
]
