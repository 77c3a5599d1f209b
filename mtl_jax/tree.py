"""What `jax.tree` and `optax.tree` lack: path strings, task axes, checked arithmetic.

Leaves of a *task tree* lead with the task axis: `[T, ...]`. Only inexact leaves
(floating point and complex) take part in arithmetic; integer, boolean and PRNG key
leaves are carried along unchanged.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mtl_jax._apart import apart
from mtl_jax._checks import (
    check_finite,
    check_match,
    is_inexact,
    named_leaves,
    num_tasks,
    path_str,
)
from mtl_jax._contractions import products, weighted_sum
from mtl_jax.order import (
    Cutoff,
    magnitude_bits,
    reaches,
    settled,
    task_top_cutoffs,
    top_cutoff,
    top_mask,
    tree_top_cutoff,
    tree_top_mask,
)

__all__ = [
    "Cutoff",
    "add_scaled",
    "check_finite",
    "check_match",
    "combine",
    "gram",
    "is_inexact",
    "magnitude_bits",
    "map_with_path",
    "nbytes",
    "num_tasks",
    "path_str",
    "paths",
    "reaches",
    "select",
    "settled",
    "size",
    "stack",
    "task_top_cutoffs",
    "top_cutoff",
    "top_mask",
    "tree_top_cutoff",
    "tree_top_mask",
    "unstack",
    "wide_dtype",
]


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function also gets the name of the leaf, first.

    >>> map_with_path(lambda name, x: f"{name}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_str(path), *leaves), tree, *rest
    )


def paths(tree: Any) -> list[str]:
    """Names of all leaves, in leaf order.

    >>> paths({"a": 1, "b": [2, 3]})
    ['a', 'b/0', 'b/1']
    """
    return list(named_leaves(tree))


def select(tree: Any, *patterns: str) -> Any:
    """Marks the leaves whose name any of the patterns finds (`re.search`).

    Args:
      tree: any tree.
      *patterns: regular expressions, searched anywhere in the name; anchor with `^`
        and `$` to match the whole.

    Returns:
      A tree of Python bools like `tree`.

    Raises:
      ValueError: a pattern finds no leaf, or is no regular expression.

    >>> select({"dense": {"bias": 1, "kernel": 2}}, "kernel$")
    {'dense': {'bias': False, 'kernel': True}}
    """
    names = paths(tree)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"select: {pattern!r} is no regular expression: {error}"
            ) from error
        if not any(re.search(pattern, name) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"select: {pattern!r} matches no leaf; there are: {shown}")
    return map_with_path(
        lambda name, _: any(re.search(pattern, name) for pattern in patterns), tree
    )


def size(tree: Any) -> int:
    """Number of elements in all leaves."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Number of bytes of all leaves, from shapes and dtypes alone."""
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def stack(trees: Sequence[Any]) -> Any:
    """Stacks trees of one structure along a new leading task axis.

    >>> stack([{"a": 1.0}, {"a": 2.0}])["a"].tolist()
    [1.0, 2.0]
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: no trees, wanted at least one")
    for i, tree in enumerate(trees[1:], 1):
        check_match(
            "stack", trees[0], tree, reference_name="tree 0", other_name=f"tree {i}"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """Splits a task tree into one tree per task; the inverse of `stack`."""
    count = num_tasks("unstack", tree)
    return [jax.tree.map(lambda leaf, t=t: leaf[t], tree) for t in range(count)]


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which sums are formed: float32, or its own where that is wider.

    Args:
      dtype: of a leaf; one that is not floating point is returned as it is.

    Returns:
      A dtype.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def _own(values):
    """Small leaves, each kept apart from those that equal it."""
    leaves, treedef = jax.tree.flatten(values)
    return treedef.unflatten([apart(i, leaf) for i, leaf in enumerate(leaves)])


@jax.jit
def _add_scaled(base, delta, scale):
    def leaf(b, d, s):
        if not is_inexact(b):
            return b
        wide = wide_dtype(b.dtype)
        moved = b.astype(wide) + s.astype(wide) * d.astype(wide)
        return moved.astype(b.dtype)

    return jax.tree.map(leaf, base, delta, _own(scale))


def add_scaled(base: Any, delta: Any, scale: Any = 1.0) -> Any:
    """Moves parameters along a delta, `base + scale * delta`.

    Args:
      base: tree of parameters, leaves [...].
      delta: tree like `base`.
      scale: one scalar, or a tree of scalars like `base` (one per leaf).

    Returns:
      Tree like `base` in its dtypes; computed in float32 (or wider) and cast once.
      Leaves of `base` that are not floating point are returned as they are.

    Raises:
      ValueError: `delta` or `scale` does not fit `base`, or a concrete scale is NaN
        or infinite.

    >>> float(add_scaled({"w": jnp.ones(())}, {"w": jnp.full((), 2.0)}, 0.5)["w"])
    2.0
    """
    check_match("add_scaled", base, delta, other_name="delta")
    if jax.tree.structure(scale) == jax.tree.structure(base):
        scales = scale
    elif jax.tree.structure(scale) == jax.tree.structure(0):
        scales = jax.tree.map(lambda _: scale, base)
    else:
        raise ValueError(
            "add_scaled: scale is neither a scalar nor a tree of scalars like base"
        )
    for name, s in named_leaves(scales).items():
        if np.shape(s):
            raise ValueError(
                f"add_scaled: scale of {name!r} is {np.shape(s)}, wanted a scalar"
            )
        if not isinstance(s, jax.core.Tracer) and not np.all(np.isfinite(s)):
            raise ValueError(f"add_scaled: scale of {name!r} is {s}, wanted a number")
    return _add_scaled(
        jax.tree.map(jnp.asarray, base),
        jax.tree.map(jnp.asarray, delta),
        jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), scales),
    )


@jax.jit
def _combine(tree, weights):
    def leaf(x, w):
        if not is_inexact(x):
            return x[0]
        return weighted_sum(x, w.astype(wide_dtype(x.dtype))).astype(x.dtype)

    return jax.tree.map(leaf, tree, _own(weights))


def combine(tree: Any, weights: Any) -> Any:
    """Weighted sum over tasks, `sum_t weights[t] * tree[t]`.

    Args:
      tree: task tree, leaves [T, ...].
      weights: [T], or a tree like `tree` with leaves [T] (one row per leaf).

    Returns:
      Tree with leaves [...] in the leaves' own dtypes; computed in float32 (or
      wider) and cast once. Leaves that are not floating point are the first task's.

    Raises:
      ValueError: the weights do not fit the tree.

    >>> combine({"w": jnp.eye(2)}, jnp.array([2.0, 3.0]))["w"].tolist()
    [2.0, 3.0]
    """
    count = num_tasks("combine", tree)
    per_leaf = jax.tree.structure(weights) == jax.tree.structure(tree)
    if not per_leaf:
        shared = jnp.asarray(weights)
        weights = jax.tree.map(lambda _: shared, tree)
    for name, w in named_leaves(weights).items():
        if np.shape(w) != (count,):
            where = f"weights of {name!r}" if per_leaf else "weights"
            raise ValueError(
                f"combine: {where} are {np.shape(w)}, wanted ({count},), one per task"
            )
    return _combine(tree, jax.tree.map(jnp.asarray, weights))


@jax.jit
def _gram(tree, other):
    def leaf(x, y):
        if y is x:
            y = x = x if x.dtype.itemsize == 2 else x.astype(jnp.float32)
        elif x.dtype != y.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return products(x, y)

    other = tree if other is None else other

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    found = [leaf(x, y) for x, y in pairs if is_inexact(x)]
    return sum(found[1:], found[0])


def gram(tree: Any, other: Any = None) -> jax.Array:
    """Inner products between tasks, `G[i, j] = <tree[i], other[j]>`.

    Args:
      tree: task tree, leaves [T, ...]; only real floating point leaves count.
      other: tree like `tree`; None for `tree` itself.

    Returns:
      [T, T] float32, summed leaf by leaf; with one tree symmetric positive
      semi-definite.

    Raises:
      ValueError: leaves without one common task axis, complex leaves, no floating
        point leaf, or trees that do not match.

    >>> gram({"a": jnp.eye(2), "b": jnp.ones((2, 3))}).tolist()
    [[4.0, 3.0], [3.0, 4.0]]
    """
    num_tasks("gram", tree)
    named = named_leaves(tree)
    for name, leaf in named.items():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"gram: {name!r} is {leaf.dtype}, wanted a real dtype")
    if not any(is_inexact(leaf) for leaf in named.values()):
        raise ValueError("gram: the tree has no floating point leaf")
    if other is None:
        return _gram(tree, None)
    check_match("gram", tree, other, other_name="other")
    return _gram(tree, other)
