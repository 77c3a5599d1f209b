"""Folders that take a checkpoint: whether they can, and what makes room in them."""

import fnmatch
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from mtl_jax.checkpoints import _journal
from mtl_jax.checkpoints._layout import Layout
from mtl_jax.checkpoints.source import CONFIG, TensorSpec
from mtl_jax.io import shards

__all__ = [
    "check_apart",
    "check_target",
    "local_folder",
    "partial",
    "refuse_loss",
    "retire",
]

_SHARDS = "model-*-of-*.safetensors"
# Files that loaders look for beside the weights.
_OWN_FILES = (
    "adapter_config.json",
    "added_tokens.json",
    "bank.json",
    "chat_template.*",
    "generation_config.json",
    "merges.txt",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "spiece.model",
    f"task.{12 * '[0-9a-f]'}.*",  # of the tasks in a bank
    "tokenizer.*",
    "tokenizer_config.json",
    "vocab.*",
)


def local_folder(out: epath.PathLike) -> pathlib.Path:
    """The path of a folder to write to.

    Raises:
      ValueError: for one that is not of this machine.
    """
    if "://" in str(out):
        raise ValueError(f"CheckpointWriter: {out}: wants a local folder")
    return pathlib.Path(out)


def partial(folder: pathlib.Path, file: str) -> pathlib.Path:
    """What a file is called until it is complete."""
    return folder / f".{file}.partial"


def check_apart(where: str, out: epath.PathLike, inputs: Iterable[Any]) -> None:
    """Refuses to write into a folder that is read from.

    Args:
      where: what is refused, for the message.
      out: the folder.
      inputs: folders, or files in folders.

    Raises:
      ValueError: naming it.
    """
    folder = os.path.realpath(out)
    for path in map(os.path.realpath, inputs):
        if folder in (path, os.path.dirname(path) if os.path.isfile(path) else path):
            raise ValueError(f"{where}: {out} is read from, choose another folder")


def refuse_loss(folder: pathlib.Path, beside: Iterable[str]) -> None:
    """Refuses a folder with what would be replaced.

    Args:
      folder: that is there.
      beside: names of the files that go beside the tensors.

    Raises:
      ValueError: for a checkpoint, or a file of such a name.
    """
    for name in sorted(child.name for child in folder.iterdir()):
        if name == shards.INDEX or name.endswith(".safetensors"):
            raise ValueError(
                f"{folder} holds a checkpoint ({name}): choose another folder, or "
                "allow to overwrite"
            )
    for name in sorted(beside):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds {name}, which would be replaced: choose another "
                "folder, or allow to overwrite"
            )


def check_target(
    out: epath.PathLike,
    specs: Mapping[str, TensorSpec],
    *,
    plan: str,
    shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    beside: Iterable[str] = (),
) -> None:
    """Refuses what `CheckpointWriter` with these arguments would, and writes nothing.

    Raises:
      ValueError: as the writer.
      OSError: if there is no room, or no permission, or a file in the way.
    """
    folder = local_folder(out)
    layout = Layout(specs, shard_bytes, metadata)
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {folder}: no permission for {there}")
    if folder.exists():
        found = _journal.peek(folder)
        if found is None and not overwrite:
            refuse_loss(folder, beside)
        if found not in (None, layout.digest(plan)) and not overwrite:
            raise _journal.of_another_plan(folder)
    files = [partial(folder, name) for name in layout.sizes]
    reserved = sum(f.stat().st_blocks * 512 for f in files if f.exists())
    wanted = sum(layout.sizes.values()) - reserved
    if wanted > shutil.disk_usage(there).free:
        raise OSError(f"cannot write {folder}: no room for {wanted:,} bytes")


def retire(folder: pathlib.Path, files: Iterable[str]) -> None:
    """Removes a checkpoint that is replaced, first of all what makes it whole.

    So that nothing of its tokenizer, or of a bank that it was, is taken for a part of
    the new one, files of such names go too.

    Args:
      folder: where it is, or is not.
      files: names that are going to be replaced anyway.
    """
    old = [folder / shards.WEIGHTS, *folder.glob(_SHARDS)]
    old = [path for path in old if path.exists()]
    (folder / shards.INDEX).unlink(missing_ok=True)
    if old:
        (folder / CONFIG).unlink(missing_ok=True)
        there = {child.name for child in folder.iterdir() if child.is_file()}
        for name in there.difference(files):
            if any(fnmatch.fnmatch(name, pattern) for pattern in _OWN_FILES):
                (folder / name).unlink()
    for path in old:
        path.unlink()
