"""GradDrop, one sign per coordinate, drawn by how pure the signs are."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import Aggregator, from_gradients


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


def grad_drop(*, leak: Any = 0.0, seed: int = 0) -> Aggregator:
    r"""Keeps, at each coordinate, the entries of one sign and drops the others.

    With P = (1 + sum_t g_t / sum_t |g_t|) / 2 and U uniform, both per coordinate,
    positive entries are kept where P > U and negative ones where P < U;

      d = sum_t (leak[t] + (1 - leak[t]) kept_t) g_t.

    Updates: leaves [T, ...] -> [...]. State: a typed PRNG key.

    Args:
      leak: share of the dropped entries that is let through, one number or [T].
      seed: of U, which is shared by all tasks.

    Raises:
      ValueError: a leak outside [0, 1]; at update, leaks that are not one per task.

    **Follows**: Chen et al. 2020, "Just Pick a Sign: Optimizing Deep Multitask Models
      with Gradient Sign Dropout", alg. 1, lines 10 to 15, f the identity.
    **Differs**: acts on whatever gradients it gets; the paper's are those at a shared
      representation, times the sign of that representation. U has 16 bits where the
      last axis is even, and zero entries only are no division by zero.

    >>> tx = grad_drop()
    >>> grads = {"w": jnp.array([[1.0, -2.0], [3.0, -1.0]])}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [4.0, -3.0]
    """
    shares = np.asarray(leak, np.float32)
    if shares.ndim > 1 or not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"grad_drop: leak is {leak}, wanted in [0, 1], scalar or [T]")
    nothing = not shares.any()

    def update(task_grads, key, **extra):
        del extra
        count = tree.num_tasks("grad_drop", task_grads)
        if shares.ndim and shares.shape != (count,):
            raise ValueError(
                f"grad_drop: leak is {shares.shape}, wanted ({count},), one per task"
            )
        leaks = None if nothing else jnp.broadcast_to(shares, (count,))
        key, use = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(task_grads)
        out = [
            _leaf(x, leaks, jax.random.fold_in(use, i)) if tree.is_inexact(x) else x[0]
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, out), key

    return from_gradients("grad_drop", lambda params: jax.random.key(seed), update)
