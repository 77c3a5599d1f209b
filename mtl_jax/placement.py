"""Where activations lie on the mesh in context.

The compiler places what no one places. Where parameters are split over `data`, too, its
choice may be to gather activations instead of weights, at many times the memory. These
functions leave it no choice. Without a mesh in context (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh`, which the trainer enters) they do nothing.
"""

import re
from collections.abc import Sequence
from typing import Any

import chex
import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mtl_jax import tree


def parts(size: int, axis: str = "data") -> int:
    """Into how many parts the mesh in context splits a dimension.

    Args:
      size: of the dimension.
      axis: of the mesh.

    Returns:
      The size of the axis; 1 where the mesh lacks it, it does not divide `size`, or
      `shard_map` manages it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get(axis) != AxisType.Auto or size % mesh.shape[axis]:
        return 1
    return mesh.shape[axis]


def keep_split(x: chex.Array, *axes: str | None) -> chex.Array:
    """Holds dimensions of an activation on axes of the mesh in context.

    Args:
      x: any array.
      *axes: of the mesh, one for each of the first dimensions; None, and all other
        dimensions, = whole. One that cannot be had (see `parts`) is left to the
        compiler, and where none can be, everything is.

    Returns:
      x.
    """
    pairs = tuple(zip(axes, x.shape, strict=False))
    had = [axis for axis, size in pairs if axis is not None and parts(size, axis) > 1]
    if not had:
        return x
    spec = [axis if axis is None or axis in had else P.UNCONSTRAINED for axis in axes]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def keep_by_rules(values: chex.ArrayTree, rules: Sequence[tuple[str, P]]) -> Any:
    """`keep_split` of the leaves of a tree, each by the first rule found in its path.

    Args:
      values: tree of arrays.
      rules: (regex, PartitionSpec) pairs; a leaf that none names is left alone.

    Returns:
      The tree.
    """

    def leaf(name, x):
        found = (spec for regex, spec in rules if re.search(regex, name))
        return keep_split(x, *next(found, ()))

    return tree.map_with_path(leaf, values)
