"""Pretrained checkpoints in foreign layouts: one file or a folder of shards."""

import collections
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.typing import DTypeLike

from mtl_jax.io import gguf, safetensors, shards
from mtl_jax.io.names import NameTable, of_config

_CONFIG = "config.json"


def load_pretrained(
    path: epath.PathLike,
    table: NameTable | None = None,
    like: Any = None,
    *,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into the parameters of one of our backbones.

    Args:
      path: a safetensors file, a GGUF file (`*.gguf`), or a folder with
        `model.safetensors`, with shards and their index, or else with one GGUF file.
      table: layout of the checkpoint, from `io.names`. None: as the metadata of a GGUF
        file or the `config.json` of a folder say.
      like: parameters or their `jax.eval_shape`, unrolled or scanned; gives
        structure, shapes, dtypes and shardings, and lets every fault be named. None:
        whatever layers the file holds, unrolled, in its own dtypes.
      dtype: what floating-point leaves are cast to, one after the other as they are
        read: "bfloat16" never holds the float32 that a quantised file decodes to. None
        = as `like` or the file say.

    Returns:
      Nested dict of JAX arrays, to be used as `params`.

    Raises:
      FileNotFoundError: if there is nothing to read.
      ValueError: for a corrupt file, a layout that is not known, or listing every
        tensor that is missing, unexpected or of the wrong shape.
    """
    path = epath.Path(path)
    where = f"load_pretrained: {path}"
    file = gguf_in(path)
    if table is None:
        if file:
            return gguf.load(file, like, dtype=dtype)
        if path.is_file():
            raise ValueError(f"{where}: a single file needs a table of io.names")
        table = of_config(read_config(path), where=where)
    tensors = gguf.GgufFile(file) if file else _open(path)
    return table.load(tensors, like, dtype=dtype, where=where)


def gguf_in(path: epath.PathLike) -> epath.Path | None:
    """The GGUF file that `load_pretrained` reads at a path; None = safetensors.

    Raises:
      ValueError: for a folder with several and no safetensors.
    """
    path = epath.Path(path)
    if any((path / name).is_file() for name in (shards.WEIGHTS, shards.INDEX)):
        return None
    return gguf.find(path)


def save_pretrained(
    path: epath.PathLike,
    params: Any,
    table: NameTable,
    *,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes parameters in a foreign layout.

    Args:
      path: a file ending in `.safetensors`, or a folder (made if need be) that gets
        `model.safetensors` or shards with their index.
      params: parameters, unrolled or scanned.
      table: layout to write.
      config: contents of `config.json`, for a folder.
      shard_bytes: at most so many bytes of tensors in a file of a folder, or one
        tensor; None = one file.

    Raises:
      ValueError: listing the leaves that the table does not cover, or for a config or
        shards beside a single file.
      OSError: if the file cannot be written.
    """
    path = epath.Path(path)
    tensors = table.save(params)
    if path.suffix == ".safetensors":
        if config is not None or shard_bytes is not None:
            what = "shards need" if config is None else "config needs"
            raise ValueError(f"save_pretrained: {what} a folder, not a file")
        safetensors.save(path, tensors, {"format": "pt"})
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {path}: {error.strerror or error}") from error
    if shard_bytes is None:
        safetensors.save(path / shards.WEIGHTS, tensors, {"format": "pt"})
        (path / shards.INDEX).unlink(missing_ok=True)
    else:
        _save_shards(path, tensors, shard_bytes)
        (path / shards.WEIGHTS).unlink(missing_ok=True)
    if config is not None:
        (path / _CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")


def _save_shards(path, tensors, limit):
    """Files that are filled one after the other, then their index."""
    sizes = {n: math.prod(x.shape) * x.dtype.itemsize for n, x in tensors.items()}
    files = shards.divide(sizes, limit)
    for file, names in files.items():
        part = {name: tensors[name] for name in names}
        safetensors.save(path / file, part, {"format": "pt"})
    (path / shards.INDEX).write_text(shards.index(files, sizes))


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder.

    `models.build(table.model, **table.options(read_config(path)))` is the backbone
    that fits its weights.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a JSON object.
    """
    path = epath.Path(path) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return shards.read_json(path)


def _open(path):
    """All tensors of a file, a folder or an index, none of them read yet."""
    if not path.is_dir():
        return safetensors.SafetensorsFile(path)
    if (path / shards.WEIGHTS).is_file():
        return safetensors.SafetensorsFile(path / shards.WEIGHTS)
    if (path / shards.INDEX).is_file():
        return collections.ChainMap(*shards.open_shards(path).values())
    found = sorted(child.name for child in path.iterdir())
    raise FileNotFoundError(
        f"{path} has neither {shards.WEIGHTS} nor {shards.INDEX}; found: "
        f"{', '.join(found) or 'nothing'} (only safetensors and GGUF are read)"
    )
