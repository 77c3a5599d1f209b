"""What an interrupted write has finished, as far as the disk can prove it."""

import fcntl
import json
import os
import pathlib
from typing import Any, NamedTuple

FILE = ".mtl_jax_journal"
_FORMAT = 1


class Piece(NamedTuple):
    """A run of bytes of one tensor that was written.

    Attributes:
      start: first byte.
      stop: byte after the last.
      crc: CRC-32 of the bytes.
    """

    start: int
    stop: int
    crc: int


class Journal:
    """A file of JSON lines: the plan, then one line per tensor that is complete.

    One process at a time can hold it. A last line that was cut off counts as not
    written.

    Args:
      path: the file; made if there is none.
      plan: digest of all that the bytes of the tensors follow from.
      restart: forget what an earlier run of another plan did.

    Attributes:
      finished: tensor -> its pieces in order, from earlier runs of the same plan.
      fresh: whether there was no earlier run at all.

    Raises:
      ValueError: if another process holds the file, or it is of another plan.
      OSError: if it cannot be written.
    """

    def __init__(self, path: pathlib.Path, plan: str, *, restart: bool = False):
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(path.parent) from None
            found, self.finished = self._read()
            self.fresh = found is None
            if found not in (None, plan) and not restart:
                raise of_another_plan(path.parent)
            if found != plan:
                self.finished = {}
                os.ftruncate(self._fd, 0)
                self._append({"format": _FORMAT, "plan": plan})
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> tuple[str | None, dict[str, list[Piece]]]:
        """The plan found, or None, and what it finished; cuts off a torn line."""
        raw = self.path.read_bytes()
        plan, finished, good = None, {}, 0
        for line in raw.splitlines(keepends=True):
            entry = _entry(line)
            if plan is None:
                plan = _plan(entry)
            elif {"tensor", "pieces"} <= set(entry):
                finished[entry["tensor"]] = [Piece(*each) for each in entry["pieces"]]
            else:
                break
            if plan is None:
                break
            good += len(line)
        os.ftruncate(self._fd, good)
        return plan, finished

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if os.write(self._fd, line) != len(line):
            raise OSError(f"cannot write {self.path}: no room for a line")

    def add(self, tensor: str, pieces: list[Piece]) -> None:
        """Notes that a tensor is complete, once its bytes are written."""
        self._append({"tensor": tensor, "pieces": pieces})

    def close(self) -> None:
        """Frees the file for other processes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Deletes the file: nothing is unfinished any more."""
        self.path.unlink(missing_ok=True)
        self.close()


def _entry(line: bytes) -> dict[str, Any]:
    """An empty object for a line that is none."""
    if not line.endswith(b"\n"):
        return {}
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _plan(entry: dict[str, Any]) -> str | None:
    """The plan that a first line names."""
    return entry.get("plan") if entry.get("format") == _FORMAT else None


def _held(folder: pathlib.Path) -> ValueError:
    return ValueError(f"{folder}: another process is writing there")


def of_another_plan(folder: pathlib.Path) -> ValueError:
    """What to raise where another plan was begun."""
    return ValueError(
        f"{folder} holds an unfinished write of another plan (other inputs, options or "
        "layout): repeat that one, or allow to overwrite"
    )


def peek(folder: pathlib.Path) -> str | None:
    """The plan of an unfinished write in a folder, without changing anything.

    Raises:
      ValueError: if another process is at it.
    """
    if not (folder / FILE).is_file():
        return None
    with (folder / FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(folder) from None
        return _plan(_entry(file.readline()))
