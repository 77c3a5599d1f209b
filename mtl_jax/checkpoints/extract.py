"""One task's checkpoint, restored from a bank and the base."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping

from etils import epath

from mtl_jax.checkpoints import (
    _bank,
    _bank_adapters,
    _bank_tensors,
    _target,
    adapters,
)
from mtl_jax.checkpoints.compress import nbytes
from mtl_jax.checkpoints.source import Source, TensorSpec, open_source
from mtl_jax.checkpoints.writer import CheckpointWriter
from mtl_jax.io import safetensors

__all__ = ["Extracted", "extract", "read_bank"]

read_bank = _bank.read_bank
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extracted:
    """What `extract` did.

    Attributes:
      tensors: how many were written.
      nbytes: of them.
      seconds: it took.
    """

    tensors: int
    nbytes: int
    seconds: float


def extract(
    bank: epath.PathLike,
    task: str,
    out: epath.PathLike,
    *,
    base: epath.PathLike | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Extracted:
    """Writes the checkpoint of one task as it was: dtypes, config, tokenizer.

    A bank of adapters gives the adapter folder back and needs no base.

    Args:
      bank: folder that `compress` made.
      task: its name in the bank.
      out: folder to make.
      base: the base of the bank, where it is not where it was.
      overwrite: replace what is in `out`.
      shard_bytes: at most so many bytes in a file, or one tensor.
      progress: called as `progress(tensors done, of how many)`.

    Returns:
      `Extracted`.

    Raises:
      FileNotFoundError: no bank, or no base.
      ValueError: an unknown task, or a base that is not that of the bank.
      OSError: files that cannot be read or written.
    """
    started = time.monotonic()
    found, tensors = read_bank(bank)
    index = found.index(task)
    _target.check_apart("extract", out, [bank])
    specs = {
        name: entry.spec(index)
        for name, entry in found.entries.items()
        if entry.has(index)
    }
    files = {
        name: epath.Path(bank) / stored
        for name, stored in found.tasks[index].files.items()
    }
    if found.kind == "adapters":
        _write_adapter(found, tensors, index, epath.Path(out), files, overwrite)
    else:
        origin = _base_of(found, base)
        _target.check_apart("extract", out, origin.paths)
        plan = f"{task}\n{tensors.fingerprint}\n{origin.fingerprint}"
        writer = CheckpointWriter(
            out,
            specs,
            plan=hashlib.sha256(plan.encode()).hexdigest(),
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            beside=files,
        )
        with writer:
            _write(found, tensors, index, origin, specs, writer, progress)
            writer.finish(files)
    return Extracted(
        tensors=len(specs), nbytes=nbytes(specs), seconds=time.monotonic() - started
    )


def _base_of(bank: _bank.Bank, path: epath.PathLike | None) -> Source:
    """The base, if it has the tensors that the bank's had."""
    try:
        base = open_source(bank.base if path is None else path)
    except FileNotFoundError as error:
        hint = "; give the base's place" if path is None else ""
        raise FileNotFoundError(
            f"extract: the base of the bank is not there: {error}{hint}"
        ) from error
    if _bank.digest_of_specs(base.specs) == bank.base_specs:
        return base
    for name, entry in bank.entries.items():
        if entry.how == _bank_tensors.OWN:
            continue
        spec, wanted = base.specs.get(name), next(filter(None, entry.shapes))
        if spec is None or tuple(spec.shape) != tuple(wanted):
            what = "no such tensor" if spec is None else f"{tuple(spec.shape)}"
            raise ValueError(
                f"extract: {base.path} is not the base of the bank, {bank.base}: "
                f"{name!r} of {tuple(wanted)} in the bank, {what} there"
            )
    raise ValueError(
        f"extract: {base.path} is not the base of the bank, {bank.base}: names, shapes "
        "or dtypes of its tensors differ"
    )


def _write(
    bank: _bank.Bank,
    tensors: Source,
    task: int,
    base: Source,
    specs: Mapping[str, TensorSpec],
    writer: CheckpointWriter,
    progress: Progress | None,
) -> None:
    method = bank.build()
    for number, name in enumerate(specs, 1):
        if name not in writer.done:
            chunks = _bank_tensors.restored(bank, tensors, name, task, base, method)
            for start, values in chunks:
                writer.write(name, start, values)
        if progress is not None:
            progress(number, len(specs))


def _write_adapter(
    bank: _bank.Bank,
    tensors: Source,
    task: int,
    out: epath.Path,
    files: Mapping[str, epath.Path],
    overwrite: bool,
) -> None:
    """An adapter folder of PEFT; its config comes last and makes it one."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise ValueError(f"extract: {out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    (out / adapters.CONFIG).unlink(missing_ok=True)
    found = dict(_bank_adapters.restored_adapter(bank, tensors, task))
    safetensors.save(out / adapters.WEIGHTS, found, {"format": "pt"})
    for name in sorted(files, key=lambda name: name == adapters.CONFIG):
        (out / name).write_bytes(files[name].read_bytes())
