"""Synthetic multi-task data with known ground truth, as pure functions of keys."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

_HIDDEN = 64
_SPREAD = 1.2
_HEAD_NORM = 16.0


class World(NamedTuple):
    """What all tasks of a zero-shot world share.

    Attributes:
      mix: [L, 64], from the latent to the hidden layer of the renderer.
      render: [64, D], from the hidden layer to inputs.
      text: [L, F], the "text encoder": class centres to class embeddings.
    """

    mix: chex.Array
    render: chex.Array
    text: chex.Array


class WorldTask(NamedTuple):
    """A task, or T tasks with a leading axis on every field.

    Attributes:
      centres: [C, L], class means in the latent space.
      head: [F, C], the frozen zero-shot classifier.
      shift: [D, D], orthogonal change of the input domain.
      bias: [D], offset of the input domain.
    """

    centres: chex.Array
    head: chex.Array
    shift: chex.Array
    bias: chex.Array


def _normals(key: chex.PRNGKey, *shapes: tuple[int, ...]) -> list[chex.Array]:
    """Standard normals of several shapes from one draw, which compiles once."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
    return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]


def make_world(
    key: chex.PRNGKey, *, latent: int = 16, inputs: int = 48, features: int = 32
) -> World:
    """Draws the shared part: mix ~ N(0, 1), render ~ N/8, text ~ N/sqrt(L).

    Args:
      key: typed PRNG key.
      latent: L.
      inputs: D.
      features: F, the size of the encoder's output.

    Returns:
      A `World` of float32 arrays.
    """
    mix, render, text = _normals(
        key, (latent, _HIDDEN), (_HIDDEN, inputs), (latent, features)
    )
    return World(mix=mix, render=render / 8, text=text / latent**0.5)


def _make_task(
    key: chex.PRNGKey, world: World, rho: chex.Array, classes: int
) -> WorldTask:
    latent, inputs = world.mix.shape[0], world.render.shape[1]
    centres, gauss, bias = _normals(key, (classes, latent), (inputs, inputs), (inputs,))
    centres = _SPREAD * centres
    embedded = jnp.dot(centres, world.text, precision="highest")
    norms = jnp.linalg.norm(embedded, axis=-1, keepdims=True)
    skew = rho * (gauss - gauss.T) / inputs**0.5
    q, r = jnp.linalg.qr(jnp.eye(inputs) + skew)
    return WorldTask(
        centres=centres,
        head=(_HEAD_NORM * embedded / norms).T,
        shift=q * jnp.where(jnp.diag(r) < 0, -1.0, 1.0)[None, :],
        bias=0.5 * rho * bias,
    )


def make_tasks(
    key: chex.PRNGKey, world: World, *, rho: chex.Array, classes: int = 10
) -> WorldTask:
    r"""Draws T tasks whose inputs are shifted by `rho` from the world's own domain.

      centres[c] ~ 1.2 N(0, I);   head[:, c] = 16 unit(centres[c] text)
      shift = qr(I + rho (K - K^T) / sqrt(D)), K Gaussian;   bias = rho/2 N(0, I)

    Args:
      key: typed PRNG key.
      world: the shared part.
      rho: [T], strength of each task's domain shift; 0 gives none at all.
      classes: C.

    Returns:
      A `WorldTask` with a leading T on every field.

    Differs: the orthogonal factor has the sign that makes R's diagonal positive, so
      that it tends to the identity as rho does to zero, on every backend.
    """
    rho = jnp.asarray(rho, jnp.float32)
    if rho.ndim != 1:
        raise ValueError(f"make_tasks: rho has shape {rho.shape}, wanted (tasks,)")
    return jax.vmap(lambda k, r: _make_task(k, world, r, classes))(
        jax.random.split(key, rho.size), rho
    )


def sample(
    key: chex.PRNGKey, world: World, tasks: WorldTask, *, rows: int
) -> dict[str, chex.Array]:
    r"""Draws `rows` labelled examples of every task.

      u = centres[y] + N(0, I);   x = 2 tanh(u mix / sqrt(L)) render shift + bias

    Args:
      key: typed PRNG key.
      world: the shared part.
      tasks: T tasks, leading axis T.
      rows: N, examples per task.

    Returns:
      `inputs` [T, N, D] float32 and `label` [T, N] int32.
    """
    latent = world.mix.shape[0]
    classes = tasks.centres.shape[1]

    def one(key, task):
        k1, k2 = jax.random.split(key)
        # The bias of a remainder of 32 random bits is below classes / 2^32.
        label = (jax.random.bits(k1, (rows,)) % jnp.uint32(classes)).astype(jnp.int32)
        u = task.centres[label] + jax.random.normal(k2, (rows, latent))
        u = jnp.dot(u, world.mix, precision="highest") / latent**0.5
        x = jnp.dot(2 * jnp.tanh(u), world.render, precision="highest")
        x = jnp.dot(x, task.shift, precision="highest") + task.bias[None, :]
        return {"inputs": x, "label": label}

    return jax.vmap(one)(jax.random.split(key, tasks.bias.shape[0]), tasks)


class ZeroShotWorld(NamedTuple):
    """A complete bench: what to pre-train on, and the target tasks with their data.

    Attributes:
      world: the shared part.
      pretrain: 40 tasks with a small shift; draw batches with `sample`.
      targets: T target tasks with a large shift.
      train: `inputs` [T, 600, D] and `label` [T, 600] of the targets.
      validation: the same with 300 rows.
      test: the same with 1000 rows.
    """

    world: World
    pretrain: WorldTask
    targets: WorldTask
    train: dict[str, chex.Array]
    validation: dict[str, chex.Array]
    test: dict[str, chex.Array]


@functools.partial(
    jax.jit,
    static_argnames=("tasks", "pretrain_tasks", "pretrain_rho", "target_rho", "sizes"),
)
def zero_shot_world(
    key: chex.PRNGKey,
    *,
    tasks: int = 8,
    pretrain_tasks: int = 40,
    pretrain_rho: float = 0.2,
    target_rho: float = 1.3,
    sizes: tuple[int, int, int] = (600, 300, 1000),
) -> ZeroShotWorld:
    """The bench for merging and task arithmetic with a frozen zero-shot head.

    An encoder from D inputs to F unit-norm features is pre-trained on the pre-training
    tasks against their frozen heads; it then classifies the target tasks above chance
    without training, and fine-tuning it on each gives task vectors.

    Args:
      key: typed PRNG key; everything follows from it.
      tasks: T, target tasks.
      pretrain_tasks: tasks to pre-train on.
      pretrain_rho: their domain shift.
      target_rho: domain shift of the targets.
      sizes: rows of train, validation and test per target task.

    Returns:
      A `ZeroShotWorld`.
    """
    k1, k2, k3 = jax.random.split(key, 3)
    world = make_world(k1)
    rho = jnp.repeat(
        jnp.array([pretrain_rho, target_rho]),
        np.array([pretrain_tasks, tasks]),
        total_repeat_length=pretrain_tasks + tasks,
    )
    drawn = make_tasks(k2, world, rho=rho)
    targets = jax.tree.map(lambda x: x[pretrain_tasks:], drawn)
    rows = sample(k3, world, targets, rows=sum(sizes))
    ends = np.cumsum(sizes)
    train, validation, test = (
        jax.tree.map(lambda x, i=int(end - size), j=int(end): x[:, i:j], rows)
        for size, end in zip(sizes, ends, strict=True)
    )
    return ZeroShotWorld(
        world=world,
        pretrain=jax.tree.map(lambda x: x[:pretrain_tasks], drawn),
        targets=targets,
        train=train,
        validation=validation,
        test=test,
    )
