"""A family of experts: one fine-tuned model per task, all from one base, cached.

Everything an expert depends on (base weights, data, settings) goes into its address,
so that any study that asks for the same expert gets it from the cache, and any change
makes a new one.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from mtl_jax import data, io, losses, train
from mtl_jax.data import wheels
from mtl_jax.models import heads
from mtl_jax.train import optim
from mtl_jax.train import state as train_state
from mtl_jax.transforms import linearize
from mtl_jax.zoo import keep
from mtl_jax.zoo.encoders import Encoder
from mtl_jax.zoo.tasks import TaskData

_FORMAT = 2  # Part of every address: raise it when training changes its meaning.
MODES = ("standard", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How experts are trained.

    Attributes:
      steps: optimizer steps per expert.
      batch_size: examples per step.
      optimizer: what `train.optim.over_steps` takes.
      logit_scale: inverse temperature of the prototype head.
      seed: of data order.
    """

    steps: int
    batch_size: int
    optimizer: Any
    logit_scale: float
    seed: int

    def __post_init__(self):
        for name, found in (("steps", self.steps), ("batch_size", self.batch_size)):
            if found < 1:
                raise ValueError(f"Settings: {name} wants at least 1, found {found}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Settings: seed wants 0 to 2**32 - 1, found {self.seed}")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(
                f"Settings: logit_scale wants a positive number, found "
                f"{self.logit_scale}"
            )


def logits_fn(encoder: Encoder, settings: Settings, mode: str):
    """`logits(params, inputs) -> [B, C_max]` for a standard or a tangent expert.

    `params` holds `encoder` (all leaves), `head`, and in linear mode `origin`: the
    trained leaves of the base, around which the encoder is expanded. Only the
    encoder is linearised; normalisation and head act on its output.
    """
    if mode not in MODES:
        raise ValueError(f"logits_fn: mode wants one of {MODES}, found {mode!r}")

    def logits(params, inputs):
        def features(trained, inputs):
            return encoder.features(train_state.merge(trained, frozen), inputs)

        trained, frozen = encoder.split(params["encoder"])
        if mode == "linear":
            features = linearize.taylor1(features, params["origin"])
        return head_logits(features(trained, inputs), params["head"], settings)

    return logits


def head_logits(features: Any, head: Any, settings: Settings) -> Any:
    """Logits [B, C_max] of features [B, D]; classes that the task lacks at -1e9."""
    found = heads.prototype_logits(features, head["prototypes"], settings.logit_scale)
    return jnp.where(head["active"], found, -1e9)


def trainable(encoder: Encoder, head: Any, settings: Settings, mode: str):
    """Fine-tuning of the encoder's trained leaves under a frozen prototype head.

    `init` gives zeros: the base comes as `params` when the trainer is started, and
    arrays and shapes serve alike for `encoder.params` and `head`.
    """
    logits = logits_fn(encoder, settings, mode)
    origin = {"origin": encoder.split(encoder.params)[0]} if mode == "linear" else {}
    like = {"encoder": encoder.params, "head": head, **origin}

    def loss_fn(params, batch, key):
        del key
        found = logits(params, batch)
        loss = losses.softmax_cross_entropy(found, batch["label"])
        correct = jnp.argmax(found, -1) == batch["label"]
        return jnp.mean(loss), {"accuracy": jnp.mean(correct.astype(jnp.float32))}

    def init(key):
        del key
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    return train.Trainable(
        init=init,
        loss_fn=loss_fn,
        tx=optim.over_steps(settings.steps, settings.optimizer),
        rules=(("^head/", jax.sharding.PartitionSpec()), *encoder.rules),
        frozen=("^head/", *(("^origin/",) if origin else ()), *encoder.frozen),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zoo:
    """A base, its tasks, and one expert per task for each mode asked for.

    Attributes:
      encoder: the encoder with the base weights.
      settings: how the experts were made.
      tasks: rows and heads.
      base: trained leaves of the base; None where a leaf is frozen.
      frozen: the other leaves.
      experts: mode -> trained leaves of each expert, in the order of `tasks`.
      records: one dict per expert: task, mode, steps, seconds, final loss.
      folder: the cache.
      identity: content hash of the base, of how features and logits are made from it,
        and of the format; part of every address and of every remembered answer.
    """

    encoder: Encoder
    settings: Settings
    tasks: tuple[TaskData, ...]
    base: Any
    frozen: Any
    experts: Mapping[str, tuple[Any, ...]]
    records: tuple[dict[str, Any], ...]
    folder: epath.Path
    identity: str


def open_zoo(
    encoder: Encoder,
    tasks: Sequence[TaskData],
    settings: Settings,
    *,
    modes: Sequence[str] = ("standard",),
    checkpoint_every: int | None = None,
    mesh: Mesh | None = None,
    folder: Any = None,
    progress: Any,
) -> Zoo:
    """Loads the experts, training those that the cache lacks.

    Each expert is written when it is done, so a stopped run loses at most the work on
    one; with `checkpoint_every` that one goes on from its last checkpoint.

    Args:
      encoder: base.
      tasks: rows and heads.
      settings: see `Settings`.
      modes: "standard" and/or "linear" (trained in the tangent space of the base).
      checkpoint_every: steps between checkpoints of an expert in the making.
      mesh: where experts are trained; see `train.Trainer`.
      folder: the cache; by default inside the package cache.
      progress: a `report.Progress`.

    Raises:
      ValueError: an unknown mode, or a cached file that is damaged.
    """
    tasks = tuple(tasks)
    _check_request(tasks, modes, checkpoint_every)
    folder = epath.Path(folder or wheels.cache_dir() / "zoo")
    base, frozen = encoder.split(encoder.params)
    identity = _identity(encoder, settings)
    experts: dict[str, tuple[Any, ...]] = {}
    records = []
    with progress.task("experts", total=len(tasks) * len(modes)) as bar:
        for mode in modes:
            family = []
            trainer = functools.cache(
                functools.partial(
                    _trainer, encoder, tasks[0].head, settings, mode, mesh
                )
            )
            for task in tasks:
                fit = functools.partial(
                    _train_expert,
                    trainer,
                    encoder,
                    task,
                    settings,
                    mode,
                    checkpoint_every,
                    progress,
                )
                address = _address(identity, task, settings, mode)
                stem = f"{mode}-{task.name}-{address}"
                leaves, record = keep.kept(stem, base, fit, folder=folder)
                family.append(leaves)
                records.append(record)
                bar.advance(task=task.name)
            experts[mode] = tuple(family)
    return Zoo(
        encoder=encoder,
        settings=settings,
        tasks=tasks,
        base=base,
        frozen=frozen,
        experts=experts,
        records=tuple(records),
        folder=folder,
        identity=identity,
    )


def _check_request(tasks: Any, modes: Sequence[str], checkpoint_every: Any) -> None:
    if not tasks or not modes:
        raise ValueError(
            f"open_zoo: wants tasks and modes, found {len(tasks)} tasks and {modes}"
        )
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"open_zoo: modes are {MODES}, found {mode!r}")
    whole = isinstance(checkpoint_every, int) and checkpoint_every >= 1
    if checkpoint_every is not None and not whole:
        raise ValueError(
            "open_zoo: checkpoint_every wants None or at least 1, found "
            f"{checkpoint_every!r}"
        )


def _identity(encoder: Encoder, settings: Settings) -> str:
    return keep.address(
        {
            "format": _FORMAT,
            "encoder": encoder.name,
            "frozen": encoder.frozen,
            "base": io.digest(encoder.params),
            "logit_scale": settings.logit_scale,
        }
    )


def _address(identity: str, task: TaskData, settings: Settings, mode: str) -> str:
    found = {
        "zoo": identity,
        "task": task.name,
        "data": task.digests["train"],
        "mode": mode,
        "settings": dataclasses.asdict(settings),
    }
    return keep.address(found)


def _trainer(encoder, head, settings, mode, mesh) -> train.Trainer:
    return train.Trainer(trainable(encoder, head, settings, mode), mesh=mesh)


def _train_expert(
    trainer, encoder, task, settings, mode, checkpoint_every, progress, workdir
) -> tuple[Any, dict[str, Any]]:
    """One expert, from the base, and its record."""
    params = {"encoder": encoder.params, "head": task.head}
    if mode == "linear":
        params["origin"] = encoder.split(encoder.params)[0]
    batches = data.pipeline(
        data.ArraySource(task.splits["train"]),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    began = time.monotonic()
    with progress.task(f"fine-tune {task.name} ({mode})", total=settings.steps) as bar:
        result = trainer().fit(
            batches.__getitem__,
            steps=settings.steps,
            seed=settings.seed,
            params=params,
            workdir=workdir if checkpoint_every else None,
            checkpoint_every=checkpoint_every,
            progress=bar,
        )
    trained, _ = encoder.split(result.params["encoder"])
    record = {
        "task": task.name,
        "mode": mode,
        "steps": settings.steps,
        "seconds": round(time.monotonic() - began, 1),
        "final_loss": result.history[-1]["loss"],
    }
    return trained, record
