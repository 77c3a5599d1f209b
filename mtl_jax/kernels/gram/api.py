"""The public `gram` and `gram_tree`."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree as trees
from mtl_jax.kernels import dispatch


def _symmetric(total: chex.Array) -> chex.Array:
    """The upper triangle on both sides, to the bit."""
    return jnp.where(jnp.tri(total.shape[0], dtype=bool), total.T, total)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _gram(leaves, implementation, interpret):
    if implementation == "xla":
        return _symmetric(trees.gram(leaves))
    from mtl_jax.kernels.gram import pallas_tpu  # only when it is used

    return _symmetric(pallas_tpu.gram(leaves, interpret=interpret))


@_gram.defjvp
def _gram_jvp(implementation, interpret, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    out = _gram(leaves, implementation, interpret)
    cross = jnp.zeros_like(out)
    for x, dot in zip(leaves, dots, strict=True):
        axes = tuple(range(1, x.ndim))
        cross += jax.lax.dot_general(
            dot.astype(jnp.float32),
            x.astype(jnp.float32),
            ((axes, axes), ((), ())),
            precision="highest",
        )
    return out, cross + cross.T


def _check(name: str, label: str, x: chex.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        raise ValueError(
            f"{name}: {label} is {x.dtype}, wanted a float of at most 32 bits"
        )


def _run(name, leaves, implementation, interpret):
    chosen = dispatch.choose(name, implementation, leaves, fits=False)
    if chosen == "pallas_tpu":
        from mtl_jax.kernels import tpu_tasks  # only when it is used

        tpu_tasks.check(name, leaves)
        dispatch.require_tpu(name, leaves, interpret=interpret)
    return _gram(leaves, chosen, interpret)


def gram(
    x: chex.Array, *, implementation: str | None = None, interpret: bool = False
) -> chex.Array:
    """Inner products between tasks.

      G[i, j] = <x[i], x[j]>

    Args:
      x: float [T, ...], at most 32 bits wide.
      implementation: "xla", "pallas_tpu", or None, which is "xla" everywhere: no
        timing of the Pallas kernel on a TPU exists. The kernel takes float32 and
        bfloat16 and at most 128 tasks; over several devices it needs `shard_map`.
      interpret: run the Pallas kernel interpreted, for debugging on any machine.

    Returns:
      [T, T] float32, symmetric to the bit; products and sums in float32.
      Differentiable any number of times, forwards and backwards.

    Raises:
      ValueError: if shape or dtype do not fit, or the implementation cannot run.

    >>> gram(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    x = jnp.asarray(x)
    _check("gram", "x", x)
    if not x.ndim or not x.shape[0]:
        raise ValueError(f"gram: x is {x.shape}, wanted [T, ...] with T >= 1")
    return _run("gram", [x], implementation, interpret)


def gram_tree(
    tree: Any, *, implementation: str | None = None, interpret: bool = False
) -> chex.Array:
    """Inner products between tasks, summed over the leaves of a task tree.

      G[i, j] = sum over leaves of <leaf[i], leaf[j]>

    The Pallas kernel reads every leaf of at least 32,768 entries per task where it
    lies, in a launch of its own, which is long enough to hide what a launch costs.
    Smaller leaves of one dtype are first copied together, up to 2^20 entries per task:
    a model has hundreds of them and they hold few of its entries. The whole model is
    never concatenated.

    Args:
      tree: leaves float [T, ...], at most 32 bits wide.
      implementation: see `gram`.
      interpret: see `gram`.

    Returns:
      [T, T] float32, symmetric to the bit.

    Raises:
      ValueError: if a leaf does not fit, by its name, or the implementation cannot
        run. Unlike `tree.gram`, integer leaves are refused instead of skipped.

    >>> gram_tree({"a": jnp.eye(2), "b": jnp.ones((2, 3))}).tolist()
    [[4.0, 3.0], [3.0, 4.0]]
    """
    tree = jax.tree.map(jnp.asarray, tree)
    trees.num_tasks("gram_tree", tree)
    trees.map_with_path(lambda name, x: _check("gram_tree", repr(name), x), tree)
    return _run("gram_tree", jax.tree.leaves(tree), implementation, interpret)
