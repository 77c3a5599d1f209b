"""Several fine-tunings of one base in a bank on disk, from which each is restored."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

import mtl_jax
from mtl_jax.checkpoints import _bank, _target, adapters
from mtl_jax.checkpoints._bank_adapters import AdapterPacker
from mtl_jax.checkpoints._bank_methods import Errors
from mtl_jax.checkpoints._bank_tensors import Packer
from mtl_jax.checkpoints.source import Source, TensorSpec, open_source
from mtl_jax.checkpoints.writer import CheckpointWriter

__all__ = ["Compressed", "compress", "is_adapter", "nbytes"]

_NOTES = ".compress.jsonl"
_OPTIONS: dict[str, dict[str, Any]] = {
    "tall": {"scale": 0.4, "dtype": None},
    "rmm": {"rank": 16, "basis": 2, "svd": "gram", "align": False, "dtype": None},
    "bitdelta": {},
}
_SVD = ("svd", "gram", "sketch")
_DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress` did.

    Attributes:
      bank: its description.
      nbytes: of the tensors in the bank.
      seconds: it took.
    """

    bank: _bank.Bank
    nbytes: int
    seconds: float

    @property
    def experts_nbytes(self) -> int:
        """Of the tensors of all experts, as they were."""
        return sum(task.nbytes for task in self.bank.tasks)


def compress(
    base: epath.PathLike,
    experts: Sequence[epath.PathLike],
    out: epath.PathLike,
    *,
    method: str = "tall",
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    **options: Any,
) -> Compressed:
    """Writes a bank of fine-tunings, one tensor after the other.

    Floating point tensors that all experts share with the base are kept by the method;
    the others as every expert has them, or not at all where they are integers equal to
    the base's. The base itself is not in the bank: keep it.

    Args:
      base: what the experts were fine-tuned from; see `open_source`.
      experts: checkpoints, or adapter folders of PEFT (method "rmm" only).
      out: folder to make.
      method: "tall": the sum of all changes and a mask of one bit per entry and task;
        option `scale`, lambda, one number or one per task (0.4; choose them on
        validation data). "bitdelta": one bit per entry and one number per matrix and
        task. "rmm": options `rank` (16), `basis` (2), `svd`, `align`; see
        `merging.rmm_basis`.
      names: of the tasks; those of the folders by default.
      overwrite: replace what is in `out`.
      shard_bytes: at most so many bytes in a file, or one tensor.
      progress: called as `progress(tensors done, of how many)`.
      **options: of the method; `dtype` of what is stored (the experts' by default).

    Returns:
      `Compressed`.

    Raises:
      ValueError: what is wrong with a method, an option, a name or a tensor, which it
        names; also NaN and infinity in a tensor.
      OSError: files that cannot be read or written.
    """
    started = time.monotonic()
    paths = [str(path) for path in experts]
    tasks = dict(
        zip(_bank.task_names(paths, names), map(open_source, paths), strict=True)
    )
    if not tasks:
        raise ValueError("compress: no experts, wanted at least one")
    options = _checked_options(method, options, len(tasks))
    origin = open_source(base)
    for source in (origin, *tasks.values()):
        _target.check_apart("compress", out, source.paths)
    packer = _packer(method, options, origin, tasks)
    plan = _plan(method, options, origin, tasks)
    writer = CheckpointWriter(
        out,
        packer.specs,
        plan=plan,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        metadata={"format": "mtl_jax bank"},
        beside=[_bank.DESCRIPTION],
    )
    with writer, Notes(epath.Path(out) / _NOTES, plan) as notes:
        total = _store(packer, writer, notes, len(tasks), progress)
        files, stored = _side_files(list(tasks.values()))
        bank = _bank.Bank(
            kind="checkpoints" if isinstance(packer, Packer) else "adapters",
            method=method,
            options=options,
            tasks=_described(paths, tasks, total, files),
            entries=packer.entries,
            base=_bank.location(base),
            base_specs=_bank.digest_of_specs(origin.specs),
            checksums=packer.checksums,
            version=mtl_jax.__version__,
        )
        writer.finish({**stored, _bank.DESCRIPTION: bank.to_json().encode()})
        notes.remove()
    return Compressed(
        bank=bank, nbytes=nbytes(packer.specs), seconds=time.monotonic() - started
    )


def _described(
    paths: Sequence[str],
    tasks: Mapping[str, Source],
    total: Errors,
    files: Sequence[Mapping[str, str]],
) -> tuple[_bank.Task, ...]:
    rows = zip(paths, tasks.items(), total.relative, files, strict=True)
    return tuple(
        _bank.Task(
            name=name,
            source=_bank.location(path),
            error=error,
            nbytes=nbytes(source.stored),
            files=own,
        )
        for path, (name, source), error, own in rows
    )


def nbytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of tensors."""
    return sum(spec.nbytes for spec in specs.values())


def _checked_options(
    method: str, options: Mapping[str, Any], tasks: int
) -> dict[str, Any]:
    """All options of a method, as they are kept in the bank."""
    if method not in _OPTIONS:
        raise ValueError(
            f"compress: no method {method!r}; there are {', '.join(_OPTIONS)}"
        )
    known = _OPTIONS[method]
    for name in options:
        if name not in known:
            raise ValueError(
                f"compress: {name!r} is no option of {method}, which has "
                f"{', '.join(known) or 'none'}"
            )
    found = {**known, **{k: v for k, v in options.items() if v is not None}}
    if method == "tall":
        scale = found.pop("scale")
        scales = [scale] * tasks if isinstance(scale, int | float) else list(scale)
        if len(scales) == 1:
            scales *= tasks
        if len(scales) != tasks or not all(0 <= x < math.inf for x in scales):
            raise ValueError(
                f"compress: scale is {scale}, wanted one number of at least 0, or one "
                f"for each of {tasks} tasks"
            )
        found["scales"] = [float(x) for x in scales]
    for name, least in (("rank", 1), ("basis", 0)):
        if name in found and not (
            isinstance(found[name], int) and found[name] >= least
        ):
            raise ValueError(
                f"compress: {name} is {found[name]!r}, wanted an integer of at least "
                f"{least}"
            )
    if "svd" in found and found["svd"] not in _SVD:
        raise ValueError(
            f"compress: svd is {found['svd']!r}, wanted one of {', '.join(_SVD)}"
        )
    if found.get("dtype") is not None:
        found["dtype"] = _float_name(found["dtype"])
    return found


def _float_name(dtype: Any) -> str:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise ValueError(
            f"compress: dtype is {dtype!r}, wanted one of {', '.join(_DTYPES)}"
        )
    return found.name


def _packer(
    method: str, options: Mapping[str, Any], base: Source, tasks: Mapping[str, Source]
) -> Packer | AdapterPacker:
    """For checkpoints, or for adapters where all experts are."""
    built = _bank.METHODS[method](**_bank.restored_options(options))
    found = [name for name, source in tasks.items() if is_adapter(source)]
    if not found:
        for name, source in tasks.items():
            if not any(tensor in base for tensor in source):
                raise ValueError(
                    f"compress: {name} has no tensor of the base {base.path}, such as "
                    f"{next(iter(base), None)!r}"
                )
        return Packer(method, built, base, tasks)
    if len(found) < len(tasks):
        raise ValueError(
            f"compress: {found[0]} is an adapter and others are not; give it as "
            "BASE+ADAPTER"
        )
    if not isinstance(built, _bank.METHODS["rmm"]):
        raise ValueError(
            f"compress: {method} keeps whole checkpoints; give adapters as "
            "BASE+ADAPTER, or use rmm"
        )
    for source in tasks.values():
        adapters.add_adapter(base, source.path)  # Refuses those of other bases.
    return AdapterPacker(built, tasks)


def is_adapter(source: Source) -> bool:
    """Whether this is an adapter folder of PEFT by itself."""
    return "peft_type" in (source.config or {})


def _store(
    packer: Packer | AdapterPacker,
    writer: CheckpointWriter,
    notes: "Notes",
    tasks: int,
    progress: Progress | None,
) -> Errors:
    """Fills the bank; what an interrupted run finished is not read again."""
    total = Errors.zero(tasks)
    done = writer.done

    def put(name: str, start: int, values: np.ndarray) -> None:
        if name not in done:
            writer.write(name, start, values)

    for number, name in enumerate(packer.entries, 1):
        noted = notes.get(name)
        if noted and done.issuperset(packer.keys(name)):
            errors = Errors(np.array(noted["lost"]), np.array(noted["total"]))
            packer.checksums |= noted["checksums"]
        else:
            errors = packer.store(name, put)
            sums = {k: v for k, v in packer.checksums.items() if k == name}
            lost, whole = errors.lost.tolist(), errors.total.tolist()
            notes.add(name, {"lost": lost, "total": whole, "checksums": sums})
        total.add(errors)
        if progress is not None:
            progress(number, len(packer.entries))
    return total


class Notes:
    """What a run knows of the tensors it has stored, for the one that resumes it.

    Lines of JSON; a last line that was not finished counts for nothing. The writer says
    which tensors are whole, these only add to it.
    """

    def __init__(self, path: epath.Path, plan: str):
        self._path, self._plan = path, plan

    def __enter__(self) -> "Notes":
        self._found: dict[str, Any] = {}
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    self._found |= json.loads(line)
        self._file = self._path.open("a")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def get(self, name: str) -> dict[str, Any] | None:
        """What is known of a tensor; nothing of those of another plan."""
        note = self._found.get(name)
        return note if note and note["plan"] == self._plan else None

    def add(self, name: str, note: Mapping[str, Any]) -> None:
        """Keeps what is known of a tensor."""
        self._file.write(f"\n{json.dumps({name: {**note, 'plan': self._plan}})}")
        self._file.flush()

    def remove(self) -> None:
        """The work is done."""
        self._path.unlink(missing_ok=True)


def _side_files(
    sources: Sequence[Source],
) -> tuple[list[dict[str, str]], dict[str, epath.Path]]:
    """Per source, name -> name in the bank; and name in the bank -> file, once each."""
    names: list[dict[str, str]] = []
    stored: dict[str, epath.Path] = {}
    for source in sources:
        own, files = {}, dict(source.side_files)
        if is_adapter(source):
            files[adapters.CONFIG] = source.path / adapters.CONFIG
        for name, path in files.items():
            digest = hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()[:12]
            own[name] = f"task.{digest}.{name}"
            stored[own[name]] = path
        names.append(own)
    return names, stored


def _plan(
    method: str, options: Mapping[str, Any], base: Source, tasks: Mapping[str, Source]
) -> str:
    """A digest of everything that the bank depends on."""
    told = [
        mtl_jax.__version__,
        method,
        options,
        base.fingerprint,
        [(name, source.fingerprint) for name, source in tasks.items()],
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
