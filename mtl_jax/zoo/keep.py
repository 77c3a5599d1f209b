"""Trained parameters in the package cache, filed under what they were made from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mtl_jax import io
from mtl_jax.data import wheels

Fit = Callable[[epath.Path], tuple[Any, dict[str, Any]]]


def address(question: Mapping[str, Any]) -> str:
    """Hexadecimal digits of what decides an outcome.

    Args:
      question: plain data; of arrays their `io.digest`.

    >>> address({"steps": 1, "rate": 0.1}) == address({"rate": 0.1, "steps": 1})
    True
    """
    text = json.dumps(question, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept(
    stem: str, like: Any, fit: Fit, *, folder: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Reads what was made before, or makes and writes it.

    Args:
      stem: of the file; with an `address`, or what else tells it from all others.
      like: tree of arrays or their shapes, see `io.load_tree`.
      fit: `fit(workdir) -> (tree, record)`: arrays, and plain JSON data to keep beside
        them. The folder is for checkpoints on the way; it is removed at the end.
      folder: of the file; by default inside the package cache.

    Returns:
      (tree, record), read from the file in either case.

    Raises:
      ValueError: a file that is damaged or does not fit `like`.
    """
    path = epath.Path(folder or wheels.cache_dir() / "zoo") / f"{stem}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        workdir = path.parent / f".{path.name}.run"
        tree, record = fit(workdir)
        io.save_tree(path, tree, record)
        workdir.rmtree(missing_ok=True)
    return io.load_tree(path, like=like)
