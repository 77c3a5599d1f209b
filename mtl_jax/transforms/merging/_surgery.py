"""Representation surgery: a small correction of a merged model's features, per task."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose, _learning

_ADAM = optax.adam(1e-3)


class Surgery(NamedTuple):
    """Learned corrections.

    Attributes:
      params: {"down": [T, D, r], "up": [T, r, D]} float32, for `surgery_apply`.
      losses: [T, S] float32, of every step before its update.
    """

    params: dict[str, jax.Array]
    losses: jax.Array


def surgery_apply(params: Any, features: jax.Array) -> jax.Array:
    """Corrects features, `h - relu(h down) up`.

    Args:
      params: {"down": [D, r], "up": [r, D]} of one task; or of T, [T, D, r] and
        [T, r, D], with features [T, ..., D].
      features: [..., D].

    Returns:
      Like `features`, in their dtype; computed in float32 (or wider).

    Raises:
      ValueError: shapes that do not fit.

    >>> params = {"down": jnp.ones((2, 1)), "up": jnp.array([[0.5, 0.0]])}
    >>> surgery_apply(params, jnp.array([[1.0, 1.0], [-1.0, -1.0]])).tolist()
    [[0.0, 1.0], [-1.0, -1.0]]
    """
    features = jnp.asarray(features)
    down, up = params["down"], params["up"]
    fits = down.shape == (*up.shape[:-2], up.shape[-1], up.shape[-2])
    fits &= features.shape[-1:] == up.shape[-1:]
    fits &= down.ndim == 2 or features.shape[:1] == down.shape[:1]
    if not fits or down.ndim not in (2, 3):
        raise ValueError(
            f"surgery_apply: down is {down.shape} and up {up.shape}, features are "
            f"{features.shape}"
        )
    if down.ndim == 3:
        return jax.vmap(surgery_apply)(params, features)
    wide = tree.wide_dtype(features.dtype)
    h = features.astype(wide)
    down, up = down.astype(wide), up.astype(wide)
    inner = jax.nn.relu(jnp.matmul(h, down, precision="highest"))
    corrected = h - jnp.matmul(inner, up, precision="highest")
    return corrected.astype(features.dtype)


def surgery(
    features: jax.Array,
    targets: jax.Array,
    *,
    key: Any = None,
    rank: int = 16,
    tx: optax.GradientTransformation = _ADAM,
    params: Any = None,
    check_finite: bool = True,
) -> Surgery:
    r"""Learns, for every task, a low-rank correction towards its expert's features.

      minimise over (down, up)  mean |h - relu(h down) up - h_expert|

    The merged model and the experts stay as they are: any `apply_fn` gives the
    features, on unlabelled inputs.

    Args:
      features: h, [T, S, B, D] of the merged model: S batches of every task, one for
        each step.
      targets: the same of each task's expert, on the same inputs.
      key: typed PRNG key, of the start of `down`.
      rank: r.
      tx: optimizer.
      params: to go on from, as in `Surgery`; then the key is not used.
      check_finite: refuse NaN and infinity in concrete arrays.

    Returns:
      `Surgery`; tasks learn side by side, all steps run in one `lax.scan`.

    Raises:
      ValueError: features, targets or `params` that do not fit, a rank below 1, or NaN
        or infinity.

    Follows: Yang et al. 2024, "Representation Surgery for Multi-Task Model Merging",
      the distance of the features at the output in the first norm; rank 16, Adam at
      1e-3, `up` from 0 and `down` uniform in +-1 / sqrt(D), as released.

    >>> h = jnp.ones((1, 300, 4, 2))
    >>> found = surgery(h, 0.5 * h, key=jax.random.key(0), rank=2, tx=optax.adam(0.01))
    >>> bool(found.losses[0, 0] == 0.5), bool(found.losses[0, -1] < 0.1)
    (True, True)
    """
    name = "surgery"
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    if features.ndim != 4 or features.shape != targets.shape or not features.size:
        raise ValueError(
            f"{name}: features are {features.shape}, targets {targets.shape}, wanted "
            "[T, S, B, D] twice"
        )
    if check_finite:
        tree.check_finite(name, {"features": features, "targets": targets})
    count, side = features.shape[0], features.shape[-1]
    if params is None:
        _compose.check_key(name, key)
        if rank < 1:
            raise ValueError(f"{name}: rank is {rank}, wanted 1 or more")
        bound = side**-0.5
        down = jax.random.uniform(
            key, (count, side, rank), jnp.float32, minval=-bound, maxval=bound
        )
        params = {"down": down, "up": jnp.zeros((count, rank, side), jnp.float32)}
    shapes = params["down"].shape, params["up"].shape
    rank = shapes[0][-1]
    if shapes != ((count, side, rank), (count, rank, side)):
        raise ValueError(
            f"{name}: down and up are {shapes}, wanted [T, D, r] and [T, r, D] for "
            f"features {features.shape}"
        )
    return _learn(tx, params, features, targets)


@functools.partial(jax.jit, static_argnums=0)
def _learn(tx, params, features, targets):
    def loss(params, batch):
        wide = tree.wide_dtype(batch[0].dtype)
        h, target = (x.astype(wide) for x in batch)
        return jnp.abs(surgery_apply(params, h) - target).mean()

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        return _learning.descend(tx, grads, state, params), value

    def task(params, features, targets):
        carry = params, tx.init(params)
        (params, _), losses = jax.lax.scan(step, carry, (features, targets))
        return Surgery(params, losses)

    return jax.vmap(task)(params, features, targets)
