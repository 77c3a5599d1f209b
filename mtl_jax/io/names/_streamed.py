"""Name tables that fill each leaf in place, for files whose tensors must be decoded."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mtl_jax import tree as tree_lib
from mtl_jax.io.names._table import (
    _SCANNED,
    Hook,
    HostLeaf,
    NameTable,
    _differs,
    _unrolled,
    tree_of,
)

_ALIGN = 64


class StreamedTable(NameTable):
    """A name table that reads no tensor before its leaf is made.

    Beside the tree, the host holds one leaf and a few MiB at a time, or for a tensor
    whose rows are reordered one more tensor: not the decoded file. For this, tensors
    may have the methods `shape(name)`, `dtype(name)` and `read_into(name, out)`, as
    `gguf.GgufFile` has. Results and faults are those of `NameTable.load`.
    """

    def load(
        self,
        tensors: Mapping[str, Any],
        like: Any = None,
        *,
        where: str = "NameTable.load",
    ) -> dict[str, Any]:
        """Foreign tensors to parameters, as `NameTable.load` documents it."""
        found, problems = self._match(tensors)
        wanted = None if like is None else _unrolled(like)
        problems = self._missing(found, wanted) + problems
        leaves = {}
        for path, (name, rule) in found.items():
            if wanted is not None and path not in wanted:
                if not rule.optional:
                    problems.append(f"unexpected: {name!r} for {path!r}")
                continue
            foreign, problem = _described(tensors, name, rule.hook)
            if problem:
                problems.append(problem)
                continue
            leaves[path] = foreign
            if wanted is not None:
                problems += _differs(name, foreign, path, wanted[path])
        if problems:
            raise ValueError(f"{where}: " + "; ".join(problems))

        def fill(path, out):
            name, rule = found[path]
            _fill(out, tensors, name, rule.hook)

        if like is None:
            return tree_of({p: _made(p, leaf, fill) for p, leaf in leaves.items()})
        return tree_lib.map_with_path(lambda p, leaf: _made(p, leaf, fill), like)


def _described(tensors, name, hook: Hook):
    """Returns (shape and dtype that `hook` gives, None), or (None, problem)."""
    if hasattr(tensors, "dtype"):
        shape, dtype = tensors.shape(name), tensors.dtype(name)
    else:
        shape, dtype = np.shape(tensors[name]), np.dtype(tensors[name].dtype)
    if hook.ndim not in (None, len(shape)):
        return None, f"wrong shape: {name!r} is {shape}, wanted {hook.ndim} axes"
    try:
        ours = hook.load(np.broadcast_to(np.zeros((), dtype), shape))
    except ValueError as error:
        return None, f"wrong shape: {name!r} is {shape}: {error}"
    # The bytes are not read here: only shape and dtype are.
    return HostLeaf(ours.shape, dtype, lambda: ours), None


def _fill(out, tensors, name, hook: Hook):
    """Decodes into `out`: through a view in the foreign layout, where there is one."""
    foreign = hook.save(out)
    if hasattr(tensors, "read_into") and np.may_share_memory(foreign, out):
        tensors.read_into(name, foreign)
    else:
        out[...] = hook.load(np.asarray(tensors[name]))


def _aligned(shape, dtype):
    """An empty array that a CPU device can use as it is, and need not copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


def _made(path, leaf, fill):
    """One leaf: a buffer of its own, filled layer by layer, handed to the device."""
    dtype = np.dtype(leaf.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{path!r} is {dtype}, which JAX would narrow; switch jax_enable_x64 on "
            "to read it"
        )
    out = _aligned(leaf.shape, dtype)
    if match := _SCANNED.fullmatch(path):
        for i in range(len(out)):
            fill(f"layers_{i}/{match[1]}", out[i])
    else:
        fill(path, out)
    placed = jax.device_put(out, getattr(leaf, "sharding", None))
    # The next buffer is not made while this one is still being copied.
    return placed.block_until_ready()
