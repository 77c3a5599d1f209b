"""GradDrop, one sign per coordinate, drawn by how pure the signs are."""

from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients

At = Literal["gradients", "features"]


def _choose(rows: list[chex.Array], leak: chex.Array | None, uniform: chex.Array):
    """Sum over tasks of the entries of the drawn sign, and of the leaks of the others.

    Args:
      rows: T arrays [...].
      leak: [T] or None.
      uniform: [...] in [0, 1).
    """
    positive = sum(jnp.maximum(row, 0) for row in rows)
    negative = sum(jnp.minimum(row, 0) for row in rows)
    # Purity is positive / (positive - negative): no division, so none by zero.
    draw = positive > uniform * (positive - negative)
    chosen = jnp.where(draw, positive, negative)
    if leak is None:
        return chosen
    dropped = [jnp.where(draw, jnp.minimum(r, 0), jnp.maximum(r, 0)) for r in rows]
    return chosen + sum(leak[t] * row for t, row in enumerate(dropped))


def _leaf(x: chex.Array, leak: chex.Array | None, key: chex.PRNGKey) -> chex.Array:
    wide = tree.wide_dtype(x.dtype)
    leak = None if leak is None else leak.astype(wide)
    rows = [x[t].astype(wide) for t in range(x.shape[0])]
    shape = rows[0].shape
    if not shape or shape[-1] % 2:
        return _choose(rows, leak, jax.random.uniform(key, shape, wide)).astype(x.dtype)
    # 32 random bits serve two coordinates: drawing them costs as much as reading x.
    half = shape[-1] // 2
    bits = jax.random.bits(key, (*shape[:-1], half), jnp.uint32)
    left, right = bits >> 16, bits & 0xFFFF
    parts = [
        _choose([row[..., where] for row in rows], leak, (u.astype(wide) + 0.5) / 65536)
        for where, u in ((slice(half), left), (slice(half, None), right))
    ]
    return jnp.concatenate(parts, -1).astype(x.dtype)


def _at_features(
    x: chex.Array, z: chex.Array, leak: chex.Array | None, key: chex.PRNGKey
) -> chex.Array:
    """One sign per feature, of the sum over examples of gradients times signs.

    Args:
      x: [T, B, ...].
      z: [B, ...], the features.
      leak: [T] or None.
      key: typed PRNG key.

    Returns:
      [B, ...].
    """
    wide = tree.wide_dtype(x.dtype)
    signs = jnp.sign(z).astype(wide)
    wished = jnp.sum(x.astype(wide) * signs[None], axis=1)
    positive = jnp.sum(jnp.maximum(wished, 0), 0)
    negative = jnp.sum(jnp.minimum(wished, 0), 0)
    uniform = jax.random.uniform(key, positive.shape, wide)
    draw = positive > uniform * (positive - negative)
    kept = jnp.where(draw[None], wished > 0, wished < 0).astype(wide)
    if leak is not None:
        through = leak.astype(wide).reshape(-1, *(1,) * (kept.ndim - 1))
        kept = through + (1 - through) * kept
    return jnp.sum(kept[:, None] * x.astype(wide), 0).astype(x.dtype)


def grad_drop(*, leak: Any = 0.0, at: At = "gradients", seed: int = 0) -> Aggregator:
    r"""Keeps, at each coordinate, the entries of one sign and drops the others.

    With P = (1 + sum_t g_t / sum_t |g_t|) / 2 and U uniform, both per coordinate,
    positive entries are kept where P > U and negative ones where P < U;

      d = sum_t (leak[t] + (1 - leak[t]) kept_t) g_t.

    Updates: leaves [T, ...] -> [...]. State: a typed PRNG key.

    Args:
      leak: share of the dropped entries that is let through, one number or [T].
      at: "features" is the paper's: gradients [T, B, ...] at a shared representation
        and its extra argument `features` [B, ...], as `grads="features"` of the trainer
        has them. P and U are per feature, from sums over examples of the gradients
        times the signs of the features; all examples keep the same tasks.
      seed: of U, which is shared by all tasks.

    Raises:
      ValueError: a leak outside [0, 1], another `at`; at update, leaks that are not one
        per task, features that are missing.

    **Follows**: Chen et al. 2020, "Just Pick a Sign: Optimizing Deep Multitask Models
      with Gradient Sign Dropout", alg. 1, lines 10 to 15, f the identity.
    **Differs**: by default it acts on whatever gradients it gets, and U has 16 bits
      where the last axis is even. Zero entries only are no division by zero.

    >>> tx = grad_drop()
    >>> grads = {"w": jnp.array([[1.0, -2.0], [3.0, -1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [4.0, -3.0]
    """
    shares = np.asarray(leak, np.float32)
    if shares.ndim > 1 or not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"grad_drop: leak is {leak}, wanted in [0, 1], scalar or [T]")
    if at not in get_args(At):
        raise ValueError(f"grad_drop: at is {at!r}, wanted one of {get_args(At)}")
    nothing = not shares.any()

    def update(task_grads, key, *, features=None, **extra):
        del extra
        count = tree.num_tasks("grad_drop", task_grads)
        if shares.ndim and shares.shape != (count,):
            raise ValueError(
                f"grad_drop: leak is {shares.shape}, wanted ({count},), one per task"
            )
        leaks = None if nothing else jnp.broadcast_to(shares, (count,))
        key, use = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(task_grads)
        if at == "features":
            out = [
                _at_features(x, z, leaks, jax.random.fold_in(use, i))
                for i, (x, z) in enumerate(
                    zip(leaves, _features_of(task_grads, features), strict=True)
                )
            ]
            return jax.tree.unflatten(treedef, out), key
        out = [
            _leaf(x, leaks, jax.random.fold_in(use, i)) if tree.is_inexact(x) else x[0]
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, out), key

    return from_gradients(
        "grad_drop",
        lambda params: jax.random.key(seed),
        update,
        wants=("features",) if at == "features" else (),
    )


def _features_of(task_grads: Any, features: Any) -> list[chex.Array]:
    """The leaves of the features, refused where they are not those of the gradients."""
    if features is None:
        raise ValueError(
            'grad_drop: at="features" needs features, as in update(..., features=z); '
            'the trainer gives them with grads="features"'
        )
    first = jax.eval_shape(lambda g: jax.tree.map(lambda x: x[0], g), task_grads)
    tree.check_match(
        "grad_drop",
        features,
        first,
        reference_name="features",
        other_name="one task of updates",
    )
    return jax.tree.leaves(features)
