"""What code an outcome rests on: a digest of everything that decides its numbers."""

import functools
import hashlib
import importlib.metadata
import inspect
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import mtl_jax

# Rows are in the digest of the problem; of the data layer, what draws batches counts.
_DECIDES = (
    "data/pipelines.py",
    "data/sources.py",
    "io/names",
    "io/pretrained.py",
    "kernels",
    "losses",
    "metrics",
    "models",
    "multitask",
    "train",
    "transforms",
    "tree.py",
)
_LIBRARIES = ("flax", "jax", "jaxlib", "optax")


def source_digest(root: pathlib.Path, parts: Iterable[str]) -> str:
    """Digest of the Python files of some packages and modules.

    Args:
      root: folder.
      parts: paths of folders and files inside it.

    Returns:
      Hexadecimal digits. Every character counts, so comments and docstrings do too.

    Raises:
      ValueError: a part that does not exist.
    """
    found = hashlib.sha256()
    for part in sorted(parts):
        place = root / part
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        if not files or not files[0].exists():
            raise ValueError(f"source_digest: no Python source at {place}")
        for file in files:
            text = file.read_bytes()
            found.update(f"{file.relative_to(root)} {len(text)} ".encode() + text)
    return found.hexdigest()


@functools.cache
def package_digest() -> str:
    """Digest of what trains and measures here, and of the versions below it.

    Read once per process, so that editing a file changes nothing for one that runs.
    """
    source = source_digest(pathlib.Path(mtl_jax.__path__[0]), _DECIDES)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return hashlib.sha256(" ".join([source, *versions]).encode()).hexdigest()


def function_digest(function: Callable[..., Any]) -> str:
    """Digest of the file that a function is written in; empty where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    place = pathlib.Path(file) if file else None
    if place is None or not place.exists():
        return ""
    return source_digest(place.parent, [place.name])
