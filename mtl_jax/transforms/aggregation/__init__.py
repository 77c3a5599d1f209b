"""Gradient surgery: many task gradients in, one update out.

Every method is an optax transformation from trees with leaves [T, ...] to trees with
leaves [...]; the methods that look at inner products only have their core in
`aggregation.weights`, a pure function of the Gramian.
"""

from mtl_jax.transforms.aggregation import weights
from mtl_jax.transforms.aggregation._aligned_mtl import aligned_mtl
from mtl_jax.transforms.aggregation._base import (
    AggregationState,
    Aggregator,
    Rule,
    from_gradients,
    from_gramian,
)
from mtl_jax.transforms.aggregation._cagrad import cagrad
from mtl_jax.transforms.aggregation._combinators import (
    ReuseState,
    every_k,
    normalize,
    per_group,
    per_leaf,
    with_preference,
)
from mtl_jax.transforms.aggregation._config import config
from mtl_jax.transforms.aggregation._constant import constant
from mtl_jax.transforms.aggregation._cr_mogm import AverageState, cr_mogm
from mtl_jax.transforms.aggregation._cross_gram import cross_gram
from mtl_jax.transforms.aggregation._db_mtl import DbMtlState, db_mtl
from mtl_jax.transforms.aggregation._dual_proj import dual_proj
from mtl_jax.transforms.aggregation._engines import (
    has_transpose,
    task_gramian,
    task_rows,
    value_and_combined_grad,
    value_and_gramian,
    value_and_task_grads,
)
from mtl_jax.transforms.aggregation._excess_mtl import ExcessMtlState, excess_mtl
from mtl_jax.transforms.aggregation._fair_grad import fair_grad
from mtl_jax.transforms.aggregation._features import (
    SplitLoss,
    value_and_feature_grads,
)
from mtl_jax.transforms.aggregation._flat import (
    FlatState,
    flat_mtl,
    sam_perturbation,
)
from mtl_jax.transforms.aggregation._flat_grads import (
    FlatGradients,
    FlatTaskGrads,
    flat_task_grads,
    value_and_flat_grads,
)
from mtl_jax.transforms.aggregation._grad_drop import grad_drop
from mtl_jax.transforms.aggregation._grad_vac import GradVacState, grad_vac
from mtl_jax.transforms.aggregation._imtl_g import imtl_g
from mtl_jax.transforms.aggregation._instances import value_and_instance_gramian
from mtl_jax.transforms.aggregation._krum import krum
from mtl_jax.transforms.aggregation._linear import mean, sum
from mtl_jax.transforms.aggregation._mgda import mgda
from mtl_jax.transforms.aggregation._moco import MoCoState, moco
from mtl_jax.transforms.aggregation._modo import modo
from mtl_jax.transforms.aggregation._nash_mtl import NashState, nash_mtl
from mtl_jax.transforms.aggregation._pcgrad import pcgrad
from mtl_jax.transforms.aggregation._random import random
from mtl_jax.transforms.aggregation._scattered import (
    unscatter,
    value_and_scattered_grads,
)
from mtl_jax.transforms.aggregation._sdm_grad import sdm_grad
from mtl_jax.transforms.aggregation._trimmed_mean import trimmed_mean
from mtl_jax.transforms.aggregation._upgrad import upgrad

__all__ = [
    "AggregationState",
    "Aggregator",
    "AverageState",
    "DbMtlState",
    "ExcessMtlState",
    "FlatGradients",
    "FlatState",
    "FlatTaskGrads",
    "GradVacState",
    "MoCoState",
    "NashState",
    "ReuseState",
    "Rule",
    "SplitLoss",
    "aligned_mtl",
    "cagrad",
    "config",
    "constant",
    "cr_mogm",
    "cross_gram",
    "db_mtl",
    "dual_proj",
    "every_k",
    "excess_mtl",
    "fair_grad",
    "flat_mtl",
    "flat_task_grads",
    "from_gradients",
    "from_gramian",
    "grad_drop",
    "grad_vac",
    "has_transpose",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "normalize",
    "pcgrad",
    "per_group",
    "per_leaf",
    "random",
    "sam_perturbation",
    "sdm_grad",
    "sum",
    "task_gramian",
    "task_rows",
    "trimmed_mean",
    "unscatter",
    "upgrad",
    "value_and_combined_grad",
    "value_and_feature_grads",
    "value_and_flat_grads",
    "value_and_gramian",
    "value_and_instance_gramian",
    "value_and_scattered_grads",
    "value_and_task_grads",
    "weights",
    "with_preference",
]
