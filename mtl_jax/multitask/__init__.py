"""Multi-task problems, and the methods that are compared on them."""

from mtl_jax.multitask.methods import (
    Contest,
    Method,
    Row,
    aggregated,
    baselines,
    regularised,
    scalarised,
    simplex,
    single,
)
from mtl_jax.multitask.problem import Problem, Target, take
from mtl_jax.multitask.training import Bench, Outcome, Settings

__all__ = [
    "Bench",
    "Contest",
    "Method",
    "Outcome",
    "Problem",
    "Row",
    "Settings",
    "Target",
    "aggregated",
    "baselines",
    "regularised",
    "scalarised",
    "simplex",
    "single",
    "take",
]
