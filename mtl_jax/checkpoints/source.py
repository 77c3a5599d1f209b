"""Checkpoints to read from: named tensors, verified, none of them in memory yet."""

import fnmatch
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from mtl_jax.io import safetensors, shards

__all__ = ["ArrayView", "Source", "TensorSpec", "TensorView", "open_source"]

CONFIG = "config.json"
_RESIDENT = 64 << 20  # Bytes of a checkpoint whose pages stay in memory.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "*preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "*_config.json",
    "*.py",
)


class TensorSpec(NamedTuple):
    """What a tensor is: all that is known of it before it is read.

    Attributes:
      shape: of the tensor.
      dtype: of its entries.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.size * self.dtype.itemsize


class TensorView(Protocol):
    """One tensor that is not read yet."""

    @property
    def spec(self) -> TensorSpec:
        """Its shape and dtype."""
        ...

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries start to stop in row-major order, in the dtype of the spec."""
        ...

    def whole(self) -> np.ndarray:
        """All of it, in the shape and dtype of the spec."""
        ...


class ArrayView:
    """A view of an array in memory.

    Args:
      array: NumPy array.
    """

    def __init__(self, array: np.ndarray):
        self._array = np.asarray(array)

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the array."""
        return TensorSpec(self._array.shape, self._array.dtype)

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries start to stop in row-major order."""
        return self._array.reshape(-1)[start:stop]

    def whole(self) -> np.ndarray:
        """The array."""
        return self._array


class FileView:
    """A tensor of a safetensors file, memory-mapped."""

    def __init__(self, file: safetensors.SafetensorsFile, name: str):
        self._file, self._name = file, name
        self.spec = TensorSpec(file.shape(name), file.dtype(name))

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries start to stop in row-major order."""
        return self._file.flat(self._name, start, stop)

    def fill(self, start: int, out: np.ndarray) -> None:
        """Copies entries from `start` on into a contiguous array of the same dtype."""
        self._file.fill(self._name, start, out)

    def whole(self) -> np.ndarray:
        """The tensor."""
        return self._file[self._name]


class Source(Mapping[str, TensorView]):
    """A verified checkpoint: tensor name -> view, in the order of the files.

    Attributes:
      path: as it was opened; with adapters, of the base.
      paths: all folders and files that were opened, of adapters too.
      config: contents of `config.json`, or of `adapter_config.json` for an adapter
        alone; None without one.
      fingerprint: changes when any file of tensors does: its name, header, size or
        time of change, or the configuration of an adapter.
      side_files: name -> file that belongs into a folder made from this one:
        configurations, tokenizer, code.
      stored: name -> what lies in the files of the base; differs from `specs` where an
        adapter is added, which is done in float32.
    """

    def __init__(
        self,
        path: epath.PathLike,
        views: Mapping[str, TensorView],
        *,
        config: dict[str, Any] | None = None,
        fingerprint: str = "",
        side_files: Mapping[str, pathlib.Path] | None = None,
        stored: Mapping[str, TensorSpec] | None = None,
        adapters: tuple[epath.Path, ...] = (),
    ):
        self.path = epath.Path(path)
        self.paths = (self.path, *adapters)
        self._views = dict(views)
        self.config = config
        self.fingerprint = fingerprint
        self.side_files = dict(side_files or {})
        self.stored = dict(self.specs if stored is None else stored)

    def __getitem__(self, name: str) -> TensorView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> shape and dtype of what the views give."""
        return {name: view.spec for name, view in self._views.items()}


def open_source(path: epath.PathLike) -> Source:
    """Opens a checkpoint and verifies it, without reading its tensors.

    Args:
      path: a folder with `model.safetensors`, or with shards and their index, or with
        one other safetensors file; a safetensors file; the folder of a PEFT adapter,
        which gives its factors; a folder that `io.checkpoint.Checkpointer` wrote, or
        one step of it, which gives the leaves below `params`, or all if there are no
        such; or "BASE+ADAPTER", a checkpoint with the product of an adapter added in
        float32.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if there is nothing to read, or a shard is missing.
      ValueError: naming file and tensor, for corrupt or unsupported files, an index
        and headers that differ, or an adapter that does not belong to the base.
    """
    text = str(path)
    local = epath.Path(text)
    if not local.exists():
        for cut in [i for i, letter in enumerate(text) if letter == "+"][::-1]:
            base, adapter = text[:cut], text[cut + 1 :]
            if epath.Path(adapter).exists():
                from mtl_jax.checkpoints import adapters

                return adapters.add_adapter(open_source(base), adapter)
        raise FileNotFoundError(f"no such checkpoint: {text}")
    if local.is_file():
        return _of_files(local, {local.name: _open_file(local)}, None)
    return _open_folder(local)


def _open_file(path):
    if any(fnmatch.fnmatch(path.name, pattern) for pattern in _PICKLES):
        raise ValueError(
            f"{path}: pickled weights are not read, which may run any code; convert "
            "them to safetensors"
        )
    return safetensors.SafetensorsFile(path, pages=safetensors.Pages(_RESIDENT))


def _open_folder(path):
    names = sorted(child.name for child in path.iterdir())
    partial = [name for name in names if name.endswith(".safetensors.partial")]
    if partial and not {shards.WEIGHTS, shards.INDEX} & set(names):
        raise ValueError(f"{path}: unfinished, it still has {partial[0]}")
    config = shards.read_json(path / CONFIG) if CONFIG in names else None
    if shards.INDEX in names:
        files = shards.open_shards(path, pages=safetensors.Pages(_RESIDENT))
        if shards.WEIGHTS in names and shards.WEIGHTS not in files:
            raise ValueError(
                f"{path} has both {shards.WEIGHTS} and {shards.INDEX}, which names "
                "other files: remove those that are out of date"
            )
        return _of_files(path, files, config)
    if shards.WEIGHTS not in names and "adapter_config.json" in names:
        from mtl_jax.checkpoints import adapters

        return adapters.open_adapter(path)
    found = [name for name in names if name.endswith(".safetensors")]
    if shards.WEIGHTS in names:
        found = [shards.WEIGHTS]
    if len(found) > 1:
        raise ValueError(
            f"{path} has {', '.join(found)}, but no {shards.INDEX} that names the parts"
        )
    if found:
        return _of_files(path, {found[0]: _open_file(path / found[0])}, config)
    return _open_other(path, names)


def _open_other(path, names):
    """A folder without safetensors."""
    from mtl_jax.checkpoints import orbax

    if orbax.is_checkpoint(path):
        return orbax.open_checkpoint(path)
    for name in names:
        if any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLES):
            _open_file(path / name)
    raise FileNotFoundError(
        f"{path} holds no checkpoint: neither {shards.WEIGHTS} nor {shards.INDEX}; "
        f"found {', '.join(names[:8]) or 'nothing'}"
    )


def _of_files(path, files, config):
    return Source(
        path,
        views_of(files),
        config=config,
        fingerprint=fingerprint(files),
        side_files=_side_files(path) if path.is_dir() else {},
    )


def views_of(files: Mapping[str, safetensors.SafetensorsFile]) -> dict[str, FileView]:
    """Tensor -> view, in the order in which they lie in the files."""
    return {
        name: FileView(file, name)
        for file in files.values()
        for name in sorted(file, key=file.offset)
    }


def fingerprint(files: Mapping[str, safetensors.SafetensorsFile], *more: Any) -> str:
    """Digest of what tells files apart without reading their tensors.

    Args:
      files: name -> file.
      *more: plain JSON data that counts too.
    """
    parts: list[Any] = [list(more)]
    for name in sorted(files):
        file = files[name]
        local = os.path.exists(file.path)
        changed = os.stat(file.path).st_mtime_ns if local else file.path.stat().mtime
        tensors = [
            [n, str(file.dtype(n)), list(file.shape(n)), file.offset(n)] for n in file
        ]
        size = file.path.stat().length
        parts.append([name, size, changed, file.metadata, tensors])
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _side_files(path):
    found = {}
    for child in sorted(path.iterdir()):
        name = child.name
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in _SIDE_FILES)
        if wanted and child.is_file() and not name.endswith(".safetensors"):
            found[name] = pathlib.Path(child)
    return found
