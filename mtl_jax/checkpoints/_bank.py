"""The description of a bank: which tensors stand for which, of which tasks and base."""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mtl_jax import report
from mtl_jax.checkpoints._bank_methods import BitDelta, Method, Tall
from mtl_jax.checkpoints._bank_rmm import Rmm
from mtl_jax.checkpoints.source import Source, TensorSpec, TensorView, open_source
from mtl_jax.io import shards

__all__ = [
    "DESCRIPTION",
    "METHODS",
    "Bank",
    "Entry",
    "Parts",
    "Summed",
    "Task",
    "digest_of_specs",
    "key",
    "location",
    "read_bank",
    "restored_options",
    "task_names",
]

DESCRIPTION = "bank.json"
METHODS = {"tall": Tall, "rmm": Rmm, "bitdelta": BitDelta}
_FORMAT, _VERSION = "mtl_jax bank", 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One of the models in a bank.

    Attributes:
      name: by which it is asked for.
      source: where it was read from.
      error: |restored change - change| / |change| over what the method keeps.
      nbytes: of the tensors it had.
      files: name -> name in the bank, of config, tokenizer and the like.
    """

    name: str
    source: str
    error: float
    nbytes: int
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """How one tensor is kept.

    Attributes:
      how: the method's name; "own", every task's as it is; "base", equal to the base.
      shapes: of every task's tensor; None for a task without it.
      dtypes: likewise.
    """

    how: str
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[str | None, ...]

    @classmethod
    def of(cls, how: str, specs: Sequence[TensorSpec | None]) -> "Entry":
        """From the specs of every task's tensor."""
        return cls(
            how=how,
            shapes=tuple(None if s is None else tuple(s.shape) for s in specs),
            dtypes=tuple(None if s is None else str(s.dtype) for s in specs),
        )

    def has(self, task: int) -> bool:
        """Whether a task has the tensor."""
        return self.shapes[task] is not None

    def spec(self, task: int) -> TensorSpec:
        """Of one task's tensor, where it has one."""
        shape, dtype = self.shapes[task], self.dtypes[task]
        if shape is None or dtype is None:
            raise KeyError(task)
        return TensorSpec(shape, jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """What `bank.json` says.

    Attributes:
      kind: "checkpoints", or "adapters" of PEFT, which are restored as such.
      method: one of `METHODS`.
      options: of it, as given to `compress`.
      tasks: in the order of their index.
      entries: tensor -> how it is kept.
      base: where the base was read from.
      base_specs: digest of the names, shapes and dtypes of the base.
      checksums: CRC-32 of the tensors of the base that restoring reads.
      version: of the library.
    """

    kind: str
    method: str
    options: Mapping[str, Any]
    tasks: tuple[Task, ...]
    entries: Mapping[str, Entry]
    base: str
    base_specs: str
    checksums: Mapping[str, int]
    version: str

    def to_json(self) -> str:
        """The text of `bank.json`."""
        return json.dumps(
            {"format": _FORMAT, "format_version": _VERSION, **dataclasses.asdict(self)},
            indent=1,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Bank":
        """The inverse of `to_json`.

        Raises:
          ValueError: not the description of a bank, or one of a later format.
        """
        try:
            data = dict(data)
            if data.pop("format") != _FORMAT:
                raise ValueError("of another format")
            if (found := data.pop("format_version")) != _VERSION:
                raise ValueError(f"format version {found}, this reads {_VERSION}")
            data["tasks"] = tuple(Task(**task) for task in data["tasks"])
            for name in (
                n for t in data["tasks"] for n in (*t.files, *t.files.values())
            ):
                if os.path.basename(name) != name or name in ("", ".", ".."):
                    raise ValueError(f"{name!r} is no name of a file")
            data["entries"] = {
                name: Entry(
                    how=entry["how"],
                    shapes=tuple(s if s is None else tuple(s) for s in entry["shapes"]),
                    dtypes=tuple(entry["dtypes"]),
                )
                for name, entry in data["entries"].items()
            }
            return cls(**data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} does not describe a bank: {error}") from error

    def index(self, task: str) -> int:
        """Index of a task.

        Raises:
          ValueError: no such task, listing those there are.
        """
        names = [each.name for each in self.tasks]
        if task not in names:
            raise ValueError(f"no task {task!r} in the bank; it has {', '.join(names)}")
        return names.index(task)

    def table(self) -> report.Table:
        """One row per task."""
        options = ", ".join(
            f"{k} {v}" for k, v in self.options.items() if v not in (None, False)
        )
        return report.Table(
            title=f"Bank of {self.kind}: {self.method}",
            columns=("task", "relative error", "was", "from"),
            rows=tuple(
                (task.name, task.error, task.nbytes, task.source) for task in self.tasks
            ),
            formats={"relative error": ".4f", "was": "bytes"},
            caption=f"{options}. " * bool(options)
            + "Error: |restored change - change| / |change| of what is compressed.",
        )

    def build(self) -> Method:
        """The method with its options, for restoring."""
        return METHODS[self.method](**restored_options(self.options))


def _check_names(names: Iterable[str]) -> None:
    """Refuses what would be read or written outside of a folder."""
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is no name of a file")


def restored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a method takes them, from JSON or the command line."""
    found = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if found.get("dtype") is not None:
        found["dtype"] = jnp.dtype(found["dtype"])
    return found


def key(how: str, part: Any, name: str) -> str:
    """Name in the bank of a part of a tensor.

    >>> key("tall", "masks", "head.weight")
    'tall.masks/head.weight'
    """
    return f"{how}.{part}/{name}"


class Parts:
    """The tensors of a bank that stand for one tensor, by part."""

    def __init__(self, tensors: Mapping[str, TensorView], how: str, name: str):
        self._tensors, self._how, self._name = tensors, how, name

    def __getitem__(self, part: Any) -> TensorView:
        return self._tensors[key(self._how, part, self._name)]


class Summed:
    """A tensor that is read once from start to end, and its CRC-32 on the way."""

    def __init__(self, view: TensorView):
        self._view = view
        self.spec: TensorSpec = view.spec
        self.checksum = 0

    def flat(self, start: int, stop: int) -> np.ndarray:
        """As the tensor's own; counts what is read."""
        values = self._view.flat(start, stop)
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.checksum = zlib.crc32(raw, self.checksum)
        return values

    def whole(self) -> np.ndarray:
        """As the tensor's own."""
        return self.flat(0, self.spec.size).reshape(self.spec.shape)


def digest_of_specs(specs: Mapping[str, TensorSpec]) -> str:
    """A digest of names, shapes and dtypes, whatever their order."""
    rows = sorted((name, list(s.shape), str(s.dtype)) for name, s in specs.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def read_bank(path: epath.PathLike) -> tuple[Bank, Source]:
    """The description of a bank and its tensors.

    Raises:
      FileNotFoundError: no such bank, or one that was not finished.
      ValueError: a folder that is none, or damaged tensors.
    """
    folder = epath.Path(path)
    file = folder / DESCRIPTION
    if not file.is_file():
        what = "is no bank" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: there is no {file}")
    return Bank.from_json(shards.read_json(file), str(file)), open_source(folder)


def location(path: epath.PathLike) -> str:
    """Where a checkpoint is, whatever the working directory will be.

    >>> location("/models/base"), location("gs://models/base")
    ('/models/base', 'gs://models/base')
    """
    text = str(path)
    return os.path.abspath(text) if os.path.exists(text) else text


def task_names(sources: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """One name per expert: the given ones, or those of their folders.

    Raises:
      ValueError: another number of names than experts, an empty name or one twice.
    """
    if names is None:
        found = [epath.Path(source.rstrip("/")).name for source in sources]
        hint = "; give names"
    else:
        found, hint = [name.strip() for name in names], ""
    if len(found) != len(sources):
        raise ValueError(
            f"compress: {len(found)} names for {len(sources)} experts: "
            f"{', '.join(found)}"
        )
    for number, name in enumerate(found):
        if not name or name in found[:number]:
            what = "two experts are" if name else "an expert is"
            raise ValueError(f"compress: {what} named {name!r}{hint}")
    return found
