"""Multi-task problems, and the methods that are compared on them."""

from mtl_jax.multitask import presets
from mtl_jax.multitask.assemble import ARCHITECTURES, assemble, build, outline
from mtl_jax.multitask.methods import (
    Contest,
    Method,
    Row,
    aggregated,
    baselines,
    bilevel,
    regularised,
    scalarised,
    simplex,
    single,
)
from mtl_jax.multitask.problem import Problem, take
from mtl_jax.multitask.training import REUSE, Bench, Outcome, Settings

__all__ = [
    "ARCHITECTURES",
    "REUSE",
    "Bench",
    "Contest",
    "Method",
    "Outcome",
    "Problem",
    "Row",
    "Settings",
    "aggregated",
    "assemble",
    "baselines",
    "bilevel",
    "build",
    "outline",
    "presets",
    "regularised",
    "scalarised",
    "simplex",
    "single",
    "take",
]
