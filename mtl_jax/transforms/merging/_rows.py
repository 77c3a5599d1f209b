"""Rows of a leaf: along which axis they run, and numbers that differ by leaf."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree

PerLeaf = float | Callable[[str], float] | Any
Axis = int | Callable[[str], int] | Any


def unit_axis(path: str) -> int:
    """The `axis` along which the rows of Flax parameters are the inputs of one unit.

    Kernels are [..., in, out] and give -2; all other leaves give -1. PyTorch's linear
    weights are [out, in]: there the default does what this does here.

    Args:
      path: name of the leaf.

    Returns:
      -2 where the last part of the path is "kernel", -1 elsewhere.

    >>> unit_axis("blocks/0/kernel"), unit_axis("blocks/0/bias")
    (-2, -1)
    """
    return -2 if path.rpartition("/")[2] == "kernel" else -1


def per_leaf(fn_name: str, name: str, value: PerLeaf, taus: Any) -> list[Any]:
    """One number per leaf, from a number, a function of the path, or a tree."""
    names = tree.paths(taus)
    if callable(value):
        return [value(path) for path in names]
    if isinstance(value, (int, float)):
        return [value] * len(names)
    if jax.tree.structure(value) != jax.tree.structure(taus):
        raise ValueError(
            f"{fn_name}: {name} is neither a number, nor a function of the leaf's "
            "path, nor a tree of numbers like taus"
        )
    return jax.tree.leaves(value)


def row_axes(fn_name: str, axis: Axis, taus: Any) -> list[int]:
    """Per leaf the axis of its rows, counted from the end; -1 for scalars."""

    def check(name, x, axis):
        try:
            found = operator.index(axis)
        except TypeError:
            raise ValueError(
                f"{fn_name}: axis of {name!r} is {axis!r}, wanted an integer"
            ) from None
        shape = jnp.shape(x)[1:]
        if not shape:
            return -1
        if not -len(shape) <= found < len(shape):
            raise ValueError(
                f"{fn_name}: axis of {name!r} is {found}, wanted one of its "
                f"{len(shape)} axes {shape} (the task axis not counted)"
            )
        return found if found < 0 else found - len(shape)

    axes = per_leaf(fn_name, "axis", axis, taus)
    leaves = jax.tree.leaves(taus)
    return list(map(check, tree.paths(taus), leaves, axes))
