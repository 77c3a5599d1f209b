"""A synthetic zero-shot world as an encoder and tasks: a bench that runs in seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mtl_jax import data, io, losses, models, train
from mtl_jax.data import synthetic
from mtl_jax.models import heads
from mtl_jax.train import optim
from mtl_jax.zoo import keep
from mtl_jax.zoo.adapters import adapted
from mtl_jax.zoo.encoders import Encoder
from mtl_jax.zoo.tasks import TaskData, make_task

_RECIPE = 2  # Raise it when pretraining changes its meaning.
_LOGIT_SCALE = 16.0  # Norm of the head's columns in the definition of the world.


def world(
    *,
    tasks: int = 8,
    seed: int = 0,
    hidden: int = 192,
    unit_outputs: bool = True,
    pretrain_steps: int = 1500,
    sizes: tuple[int, int, int] = (600, 300, 1000),
    lora: dict[str, Any] | None = None,
    progress: Any,
) -> tuple[Encoder, tuple[TaskData, ...]]:
    """Draws a world, pretrains its encoder, and returns both with the target tasks.

    The encoder is an MLP 48-hidden-hidden-32; it learns from 40 tasks that resemble the
    targets but are shifted less, against their frozen heads (Adam, learning rate 1e-3,
    batch 128, fresh samples in every step).

    Args:
      tasks: T, target tasks.
      seed: everything follows from it.
      hidden: width of both hidden layers.
      unit_outputs: the encoder ends in a normalisation, as in the definition of the
        bench; a linearised encoder is then linearised through it. False leaves it to
        the head alone, as the vision towers of the papers do.
      pretrain_steps: steps of the pretraining.
      sizes: rows of train, validation and test per task.
      lora: options of `adapted`, for experts that are adapters; None trains all.
      progress: a `report.Progress`.
    """
    if len(sizes) != 3 or min(tasks, hidden, pretrain_steps, *sizes) < 1:
        raise ValueError(
            f"world: wants tasks={tasks}, hidden={hidden}, pretrain_steps="
            f"{pretrain_steps} and three sizes={tuple(sizes)}, all at least 1"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"world: seed wants 0 to 2**32 - 1, found {seed}")
    bench = synthetic.zero_shot_world(jax.random.key(seed), tasks=tasks, sizes=sizes)
    module = models.Mlp(features=(hidden, hidden, bench.world.text.shape[1]))

    def features(params, batch):
        found = module.apply({"params": params}, batch["inputs"])
        return heads.l2_normalize(found) if unit_outputs else found

    def init(key):
        return module.init(key, bench.train["inputs"][0, :1])["params"]

    drawn = io.digest((bench.world, bench.pretrain))[:16]
    name = f"world-{_RECIPE}-{drawn}-{seed}-{hidden}-{pretrain_steps}"

    def fit(workdir):
        del workdir
        with progress.task("pretrain", total=pretrain_steps) as bar:
            params = _pretrain(bench, features, init, pretrain_steps, seed, bar)
        return params, {"world": name}

    params, _ = keep.kept(name, jax.eval_shape(init, jax.random.key(0)), fit)

    def prototypes(task: data.Task, rows):
        raise ValueError(f"world: has no prototypes for the task {task.name!r}")

    encoder = Encoder(
        name=name if unit_outputs else f"{name}-raw",
        params=params,
        features=features,
        prototypes=prototypes,
        frozen=(),
        rules=((".*", PartitionSpec()),),
    )
    if lora is not None:
        encoder = adapted(encoder, **lora)
    return encoder, _targets(bench, drawn)


def _targets(bench, drawn: str) -> tuple[TaskData, ...]:
    """The target tasks with their frozen heads."""
    splits = {"train": bench.train, "validation": bench.validation, "test": bench.test}
    count, _, classes = bench.targets.head.shape
    return tuple(
        make_task(
            f"task{t}",
            {
                split: {field: np.asarray(x[t]) for field, x in rows.items()}
                for split, rows in splits.items()
            },
            bench.targets.head[t].T / _LOGIT_SCALE,
            classes,
            identity={"world": drawn, "task": t},
        )
        for t in range(count)
    )


def _pretrain(bench, features, init, steps, seed, bar) -> Any:
    """Learns the 40 source tasks through their own heads; returns the encoder."""
    count = bench.pretrain.bias.shape[0]
    key = jax.random.fold_in(jax.random.key(seed), 1)

    @jax.jit
    def batch(step):
        draw, choose = jax.random.split(jax.random.fold_in(key, step))
        rows = synthetic.sample(draw, bench.world, bench.pretrain, rows=4)
        rows["task"] = jnp.broadcast_to(jnp.arange(count)[:, None], (count, 4))
        keep = jax.random.permutation(choose, count * 4)[:128]
        return jax.tree.map(lambda x: x.reshape(count * 4, *x.shape[2:])[keep], rows)

    def loss_fn(params, batch, key):
        del key
        head = bench.pretrain.head[batch["task"]]
        unit = heads.l2_normalize(features(params, batch))
        logits = jnp.einsum("bf,bfc->bc", unit, head)
        return jnp.mean(losses.softmax_cross_entropy(logits, batch["label"])), {}

    trainable = train.Trainable(
        init=init, loss_fn=loss_fn, tx=optim.optimizer("adam", 1e-3)
    )
    result = train.Trainer(
        trainable, mesh=train.make_mesh(devices=jax.devices()[:1])
    ).fit(batch, steps=steps, seed=seed, log_every=100, progress=bar)
    return result.params
