"""Any tree of arrays as one safetensors file with names, and its content hash."""

import concurrent.futures
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtl_jax import tree as tree_lib
from mtl_jax.io import safetensors
from mtl_jax.io.names._leaves import to_device
from mtl_jax.io.names._table import tree_of

_METADATA = "mtl_jax"


def save_tree(
    path: epath.PathLike, tree: Any, metadata: dict[str, Any] | None = None
) -> None:
    """Writes a tree of arrays to one file, leaf by leaf, renamed into place at the end.

    Args:
      path: the file; its directory must exist.
      tree: any tree of arrays; leaves are stored under their paths. Node types are
        not stored, see `load_tree`.
      metadata: plain JSON data to keep beside the arrays.

    Raises:
      ValueError: if a leaf is not an array of a storable dtype, two leaves share a
        path, or the metadata is not JSON.
      OSError: if the file cannot be written; nothing is left behind then.
    """
    try:
        text = json.dumps(metadata or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_tree: metadata is not JSON: {error}") from error
    safetensors.save(path, _named("save_tree", tree), {_METADATA: text})


def load_tree(path: epath.PathLike, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_tree` wrote, bit for bit.

    Args:
      path: the file.
      like: a tree of the same paths, shapes and dtypes (arrays or abstract), whose
        node types and shardings the result takes. None: nested dicts, whatever the
        nodes were when saved.

    Returns:
      (tree of JAX arrays, metadata).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is corrupt, or listing every leaf that does not fit
        `like`.
    """
    file = safetensors.SafetensorsFile(path)
    metadata = _read_metadata(file)
    if like is None:
        if set(file) == {""}:
            return to_device("", file[""]), metadata
        leaves = {name: to_device(name, file[name]) for name in sorted(file)}
        return tree_of(leaves), metadata
    _check(file, like)

    def read(name, leaf):
        return to_device(name, file[name], getattr(leaf, "sharding", None))

    return tree_lib.map_with_path(read, like), metadata


def digest(tree: Any) -> str:
    """Content hash: paths, dtypes, shapes and bytes, whatever the node types.

    Args:
      tree: any tree of arrays.

    Returns:
      64 hexadecimal digits (SHA-256 of the leaves' own SHA-256, which are taken in
      parallel).

    Raises:
      ValueError: as `save_tree`.

    >>> import jax.numpy as jnp
    >>> digest({"a": jnp.zeros(2)}) == digest({"a": jnp.zeros(2)})
    True
    >>> digest({"a": jnp.zeros(2)}) == digest({"a": jnp.zeros((2, 1))})
    False
    """
    leaves = sorted(_named("digest", tree).items())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = list(pool.map(_digest_leaf, leaves))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest_leaf(item):
    name, leaf = item
    array = np.asarray(leaf)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    content = np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
    head = [name, str(array.dtype), list(array.shape)]
    return [*head, hashlib.sha256(content).hexdigest()]


def _named(function, tree):
    """{path: array}, refusing what a file cannot hold."""
    out = {}
    for key_path, leaf in jax.tree.leaves_with_path(tree):
        name = tree_lib.path_str(key_path)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{function}: {name!r} is a {type(leaf).__name__}, not an array"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{function}: {name!r} is a PRNG key; use jax.random.key_data"
            )
        if name in out:
            raise ValueError(f"{function}: two leaves have the path {name!r}")
        out[name] = leaf
    return out


def _read_metadata(file):
    try:
        return json.loads(file.metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise ValueError(
            f"{file.path}: metadata {_METADATA!r} is not valid JSON: {error}"
        ) from error


def _check(file, like):
    wanted = _named("load_tree", like)
    problems = [f"missing: {name!r}" for name in wanted if name not in file]
    problems += [f"unexpected: {name!r}" for name in file if name not in wanted]
    for name in (n for n in wanted if n in file):
        found = file.shape(name), file.dtype(name)
        want = tuple(wanted[name].shape), np.dtype(wanted[name].dtype)
        if found != want:
            problems.append(
                f"{name!r} is {found[1]}{list(found[0])}, wanted "
                f"{want[1]}{list(want[0])}"
            )
    if problems:
        raise ValueError(f"load_tree: {file.path}: " + "; ".join(problems))
