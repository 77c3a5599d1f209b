"""The public `weighted_combine` and `combine_tree`."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree as trees
from mtl_jax.kernels import dispatch
from mtl_jax.kernels.weighted_combine import ref

_MAX_TERMS = 64


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _combine(leaves, weights, implementation, interpret):
    """Leaves [M, ...] of leaves [T, ...] and weights [M, T]."""
    if implementation == "xla":
        # Written out, term by term, XLA fuses one pass; many terms compile for minutes.
        if len(weights) > 1 and weights.size > _MAX_TERMS:
            return [ref.weighted_combine(x, weights) for x in leaves]
        rows = [trees.combine(leaves, row) for row in weights]
        return [jnp.stack(sums) for sums in zip(*rows, strict=True)]
    from mtl_jax.kernels.weighted_combine import pallas_tpu  # only when it is used

    return pallas_tpu.weighted_combine(leaves, weights, interpret=interpret)


@_combine.defjvp
def _combine_jvp(implementation, interpret, primals, tangents):
    (leaves, weights), (leaf_dots, weights_dot) = primals, tangents
    out = _combine(leaves, weights, implementation, interpret)
    dots = []
    for x, dot in zip(leaves, leaf_dots, strict=True):
        # Differentiation in the weights sums over entries; narrow floats would round.
        x, dot, narrow = x.astype(jnp.float32), dot.astype(jnp.float32), x.dtype
        moved = jnp.tensordot(weights, dot, 1, precision="highest")
        turned = jnp.tensordot(weights_dot, x, 1, precision="highest")
        dots.append((moved + turned).astype(narrow))
    return out, dots


def _check(name: str, label: str, x: chex.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        raise ValueError(
            f"{name}: {label} is {x.dtype}, wanted a float of at most 32 bits"
        )


def _run(name, leaves, weights, implementation, interpret):
    weights = jnp.asarray(weights)
    _check(name, "weights", weights)
    tasks = leaves[0].shape[0]
    if weights.ndim not in (1, 2) or weights.shape[-1] != tasks or not weights.size:
        raise ValueError(
            f"{name}: weights are {weights.shape}, wanted ({tasks},) or (M, {tasks})"
        )
    rows = weights.astype(jnp.float32).reshape(-1, tasks)
    arrays = (*leaves, weights)
    chosen = dispatch.choose(name, implementation, arrays, fits=False)
    if chosen == "pallas_tpu":
        from mtl_jax.kernels import tpu_tasks  # only when it is used
        from mtl_jax.kernels.weighted_combine import pallas_tpu

        tpu_tasks.check(name, leaves)
        if len(rows) > pallas_tpu.MAX_SUMS:
            raise ValueError(
                f"{name}: implementation 'pallas_tpu' takes at most "
                f"{pallas_tpu.MAX_SUMS} rows of weights, found {len(rows)}"
            )
        dispatch.require_tpu(name, arrays, interpret=interpret)
    out = _combine(leaves, rows, chosen, interpret)
    return [x[0] for x in out] if weights.ndim == 1 else out


def weighted_combine(
    x: chex.Array,
    weights: chex.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> chex.Array:
    """Weighted sums over tasks.

      out[m] = sum_t weights[m, t] * x[t]

    Args:
      x: float [T, ...], at most 32 bits wide.
      weights: float [T] for one sum, or [M, T] for M of them.
      implementation: "xla", "pallas_tpu", or None, which is "xla" everywhere: no
        timing of the Pallas kernel on a TPU exists. The kernel takes float32 and
        bfloat16, at most 128 tasks and 16 sums; over several devices it needs
        `shard_map`.
      interpret: run the Pallas kernel interpreted, for debugging on any machine.

    Returns:
      [...] or [M, ...] in x's dtype; computed in float32, cast once. A weight of zero
      times NaN is NaN. Differentiable in `x` and `weights`.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run.

    >>> weighted_combine(jnp.eye(2), jnp.array([2.0, 3.0])).tolist()
    [2.0, 3.0]
    """
    x = jnp.asarray(x)
    _check("weighted_combine", "x", x)
    if not x.ndim or not x.shape[0]:
        raise ValueError(
            f"weighted_combine: x is {x.shape}, wanted [T, ...] with T >= 1"
        )
    return _run("weighted_combine", [x], weights, implementation, interpret)[0]


def combine_tree(
    tree: Any,
    weights: chex.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Weighted sums over tasks of all leaves of a task tree.

    The Pallas kernel reads every leaf of at least 32,768 entries per task where it
    lies, in a launch of its own, and smaller ones of one dtype copied together; see
    `gram_tree` for why.

    Args:
      tree: leaves float [T, ...], at most 32 bits wide.
      weights: float [T] or [M, T], for all leaves.
      implementation: see `weighted_combine`.
      interpret: see `weighted_combine`.

    Returns:
      A tree with leaves [...] or [M, ...] in the leaves' own dtypes.

    Raises:
      ValueError: if a leaf does not fit, by its name, or the implementation cannot
        run. Unlike `tree.combine`, integer leaves are refused instead of carried.

    >>> combine_tree({"w": jnp.eye(2)}, jnp.array([2.0, 3.0]))["w"].tolist()
    [2.0, 3.0]
    """
    tree = jax.tree.map(jnp.asarray, tree)
    trees.num_tasks("combine_tree", tree)
    trees.map_with_path(lambda name, x: _check("combine_tree", repr(name), x), tree)
    leaves, shape = jax.tree.flatten(tree)
    out = _run("combine_tree", leaves, weights, implementation, interpret)
    return jax.tree.unflatten(shape, out)
