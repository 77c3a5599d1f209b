"""Checkpoints of several safetensors files with an index of what lies where."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mtl_jax.io import safetensors

__all__ = ["INDEX", "WEIGHTS", "divide", "index", "open_shards", "read_json", "some"]

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: if the file holds anything else.
    """
    path = epath.Path(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return value


def open_shards(
    folder: epath.PathLike, *, pages: safetensors.Pages | None = None
) -> dict[str, safetensors.SafetensorsFile]:
    """Opens every file that the index of a folder names.

    Args:
      folder: holds `model.safetensors.index.json`.
      pages: see `SafetensorsFile`; shared by the files.

    Returns:
      File name -> file, sorted by name. Index and headers agree: each tensor lies in
      the one file that the index gives.

    Raises:
      FileNotFoundError: for a file that the index names and the folder lacks.
      ValueError: for a corrupt file, an index that is none, or naming the tensors on
        which index and headers differ.
    """
    path = epath.Path(folder) / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map")
    if bad := sorted(f for f in map(str, weight_map.values()) if "/" in f):
        raise ValueError(f"{path}: shards must lie beside it, found {bad[0]!r}")
    files = {}
    for name in sorted(set(weight_map.values())):
        if not (path.parent / name).is_file():
            held = [tensor for tensor, file in weight_map.items() if file == name]
            raise FileNotFoundError(
                f"no such file: {path.parent / name}, which {INDEX} names for "
                f"{some(held)}"
            )
        files[name] = safetensors.SafetensorsFile(path.parent / name, pages=pages)
    _agree(path, weight_map, files)
    return files


def _agree(path, weight_map, files):
    """Refuses an index that is not what the headers say."""
    if absent := [n for n, file in weight_map.items() if n not in files[file]]:
        raise ValueError(
            f"{path}: not in the shard it names: {some(sorted(absent))} "
            f"({weight_map[min(absent)]})"
        )
    held: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            if name in held:
                raise ValueError(f"{path}: {name!r} is in {held[name]} and in {file}")
            held[name] = file
    if extra := sorted(set(held) - set(weight_map)):
        raise ValueError(
            f"{path}: does not name {some(extra)}, found in {held[extra[0]]}"
        )


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, quoted, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def divide(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Files that are filled one after the other.

    Args:
      sizes: tensor -> bytes, in the order of the files.
      limit: at most so many bytes of tensors in a file, or one tensor.

    Returns:
      File name -> tensors.
    """
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    total = len(parts)
    return {
        f"model-{number:05}-of-{total:05}.safetensors": part
        for number, part in enumerate(parts, 1)
    }


def index(files: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> str:
    """Text of the index of such files.

    Args:
      files: file name -> tensors.
      sizes: tensor -> bytes.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    metadata = {"total_size": sum(sizes.values())}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
