"""Meshes, and where parameters, optimizer state and batches live on them."""

import math
import re
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax import tree as mtl_tree
from mtl_jax.train.trainable import Rules

DATA = "data"


def make_mesh(
    data: int = -1,
    model: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    **more: int,
) -> Mesh:
    """Makes the mesh every sharded program of the library runs on.

    Args:
      data: size of the axis that splits batches; -1 takes the devices left over.
      model: size of the axis that splits parameters.
      devices: the devices to use; all of them by default.
      **more: further axes by name, such as `expert=4`; one size may be -1.

    Returns:
      A mesh with Auto axes, in the order (data, model, *more).

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {DATA: data, "model": model, **more}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"make_mesh: axis {name!r} wants a positive size or -1, found {size}"
            )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"make_mesh: only one axis may be -1, found {free}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"make_mesh: axes {sizes} want {'a multiple of ' if free else ''}{fixed} "
            f"devices, found {len(devices)}"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def check_mesh(fn_name: str, mesh: Mesh) -> None:
    """Refuses a mesh that has no data axis, or whose axes are not all Auto."""
    if DATA not in mesh.axis_names:
        raise ValueError(
            f"{fn_name}: the mesh wants an axis 'data', found {mesh.axis_names}"
        )
    wrong = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Auto
    ]
    if wrong:
        raise ValueError(
            f"{fn_name}: mesh axes {wrong} are not of type Auto; "
            "make the mesh with mtl_jax.train.make_mesh"
        )


def specs_from_rules(params: chex.ArrayTree, rules: Rules) -> Any:
    """Gives every leaf the PartitionSpec of the first rule found in its path.

    Args:
      params: tree of arrays or of shapes.
      rules: ordered (regex, PartitionSpec) pairs, matched by `re.search`.

    Returns:
      A tree of PartitionSpecs with the structure of `params`.

    Raises:
      ValueError: when a leaf is not covered, or a spec has more entries than its
        leaf has dimensions.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    uncovered = []

    def leaf(path, x):
        name = mtl_tree.path_str(path)
        for pattern, spec in compiled:
            if pattern.search(name):
                if len(spec) > np.ndim(x):
                    raise ValueError(
                        f"specs_from_rules: {name!r} has {np.ndim(x)} dimensions, rule "
                        f"{pattern.pattern!r} gives it {len(spec)}: {spec}"
                    )
                return spec
        uncovered.append(name)
        return PartitionSpec()

    specs = jax.tree_util.tree_map_with_path(leaf, params)
    if uncovered:
        raise ValueError(
            f"specs_from_rules: no rule covers {_listed(uncovered)}; "
            f"rules are {[pattern for pattern, _ in rules]}"
        )
    return specs


def shardings(mesh: Mesh, params: chex.ArrayTree, specs: Any) -> Any:
    """Turns a tree of PartitionSpecs into NamedShardings, checking that they fit.

    Raises:
      ValueError: naming the leaf, when a spec names an axis that the mesh lacks or
        that does not divide the dimension it splits.
    """

    def leaf(path, x, spec):
        name = mtl_tree.path_str(path)
        for dim, entry in enumerate(spec):
            axes = (
                () if entry is None else (entry,) if isinstance(entry, str) else entry
            )
            for axis in axes:
                if axis not in mesh.shape:
                    raise ValueError(
                        f"shardings: {name!r} wants mesh axis {axis!r}, "
                        f"found axes {tuple(mesh.shape)}"
                    )
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if x.shape[dim] % parts:
                raise ValueError(
                    f"shardings: dimension {dim} of {name!r} {x.shape} does not divide "
                    f"into the {parts} parts of mesh axes {axes}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, params, specs)


def like_params(tree: Any, params: chex.ArrayTree, specs: Any) -> Any:
    """Specs for a tree that holds copies of `params`, such as an optimizer state.

    A leaf whose path ends in the path of a parameter, and whose last dimensions are
    the parameter's, is placed like it (leading dimensions whole); any other leaf is
    replicated.
    """
    known = {
        mtl_tree.path_str(path): (x.shape, spec)
        for (path, x), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)),
            strict=True,
        )
    }

    def leaf(path, x):
        parts = mtl_tree.path_str(path).split("/")
        for start in range(len(parts)):
            shape, spec = known.get("/".join(parts[start:]), (None, None))
            if shape is None:
                continue
            extra = len(x.shape) - len(shape)
            if extra >= 0 and x.shape[extra:] == shape:
                return PartitionSpec(*[None] * extra, *spec) if spec else spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(leaf, tree)


def place(tree: Any, placements: Any) -> Any:
    """Puts host or device arrays where `placements` says, on any number of hosts."""

    def leaf(x, sharding):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda k: k, out_shardings=sharding)(x)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(leaf, tree, placements)


def shard_batch(mesh: Mesh, batch: Any, *, accumulate: int = 1) -> Any:
    """Splits a batch over the mesh axis "data".

    On several hosts each process hands in its own part of the global batch.

    Args:
      mesh: a mesh with an axis "data".
      batch: tree of arrays [B, ...]; scalars are replicated.
      accumulate: number of microbatches each device will split its part into.

    Returns:
      The batch as global arrays.

    Raises:
      ValueError: naming the leaf, when it is no numeric array, when B differs
        between leaves, or when B does not divide.
    """
    processes = jax.process_count()
    check_batch(batch, mesh, accumulate=accumulate, processes=processes)

    def leaf(x):
        spec = PartitionSpec(DATA) if np.ndim(x) else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        if processes == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(leaf, batch)


def check_batch(batch: Any, mesh: Mesh, *, accumulate: int, processes: int = 1) -> int:
    """Checks a batch against a mesh and returns its number of examples, B."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    size, first = None, ""
    for path, x in leaves:
        name = mtl_tree.path_str(path)
        kind = getattr(x, "dtype", np.asarray(x).dtype if np.isscalar(x) else None)
        if kind is None or getattr(kind, "kind", "") in "OUS":
            found = type(x).__name__ if kind is None else f"an array of {kind}"
            raise ValueError(
                f"shard_batch: {name!r} wants a numeric array, found {found}"
            )
        if not np.ndim(x):
            continue
        found = np.shape(x)[0]
        if size is None:
            size, first = found, name
        if found != size:
            raise ValueError(
                f"shard_batch: {name!r} has {found} examples, {first!r} has {size}"
            )
    if not size:
        raise ValueError("shard_batch: the batch holds no examples")
    parts = mesh.shape[DATA] * accumulate
    if size * processes % parts:
        split = f"{mesh.shape[DATA]} parts of mesh axis 'data'"
        if accumulate > 1:
            split += f" times {accumulate} accumulated microbatches"
        raise ValueError(
            f"shard_batch: {first!r} has {size * processes} examples, "
            f"which do not divide into {split}"
        )
    return size * processes


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
