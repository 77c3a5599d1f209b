"""The one trainer: meshes, state, steps, checkpointed runs, evaluation, preflight."""

from mtl_jax.train import preflight
from mtl_jax.train.diagnose import NonFiniteError
from mtl_jax.train.distributed import initialize, is_main
from mtl_jax.train.evaluation import evaluate, evaluate_tasks
from mtl_jax.train.flops import Flops, count_flops
from mtl_jax.train.loop import FitResult, Trainer
from mtl_jax.train.optim import optimizer, schedule
from mtl_jax.train.sharding import make_mesh, shard_batch, specs_from_rules
from mtl_jax.train.signals import Interrupted
from mtl_jax.train.state import TrainState
from mtl_jax.train.trainable import Trainable

__all__ = [
    "FitResult",
    "Flops",
    "Interrupted",
    "NonFiniteError",
    "TrainState",
    "Trainable",
    "Trainer",
    "count_flops",
    "evaluate",
    "evaluate_tasks",
    "initialize",
    "is_main",
    "make_mesh",
    "optimizer",
    "preflight",
    "schedule",
    "shard_batch",
    "specs_from_rules",
]
