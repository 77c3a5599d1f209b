"""The one trainer: meshes, state, steps, checkpointed runs, evaluation, preflight."""

from mtl_jax.train.loop import FitResult, Trainer
from mtl_jax.train.sharding import make_mesh, shard_batch, specs_from_rules
from mtl_jax.train.state import TrainState
from mtl_jax.train.trainable import Trainable

__all__ = [
    "FitResult",
    "TrainState",
    "Trainable",
    "Trainer",
    "make_mesh",
    "shard_batch",
    "specs_from_rules",
]
