"""Checkpoint folders written piece by piece, resumable, never whole before they are."""

import contextlib
import errno
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType

import numpy as np
from etils import epath

from mtl_jax.checkpoints import _journal, _target
from mtl_jax.checkpoints._journal import Journal, Piece
from mtl_jax.checkpoints._layout import Layout
from mtl_jax.checkpoints._spool import Spool
from mtl_jax.checkpoints.source import CONFIG, TensorSpec
from mtl_jax.io import safetensors, shards

__all__ = ["CheckpointWriter"]

_DIRTY = 64 << 20  # Bytes after which the disk is told to take what it was given.
_READ = 8 << 20  # Bytes read at a time where written ones are checked.


class CheckpointWriter:
    """Writes the tensors of a checkpoint in any order, in chunks, from any thread.

    All files are laid out and their room is reserved before the first byte. Until
    `finish`, the folder has hidden `.partial` files and a journal only: nothing loads
    it. A run that is killed or leaves the context early can be repeated: tensors that
    it completed, by the journal and the checksums of their bytes, are in `done`.

    Args:
      out: local folder; made if need be.
      specs: name -> shape and dtype of every tensor, in the order of the files.
      plan: whatever the values follow from (recipe, identities of the inputs): an
        unfinished run is continued if its plan and specs are the same.
      shard_bytes: at most so many bytes of tensors in a file, or one tensor.
      metadata: of the files; None = as PyTorch programs expect.
      overwrite: replace a checkpoint and the files beside it, or an unfinished one of
        another plan. The old checkpoint stays whole until `finish`.
      beside: names of the files that `finish` will be given, so that those of others
        are not replaced unasked.
      buffer_bytes: chunks that wait for the disk; `write` blocks beyond that.

    Attributes:
      done: tensors that need not be written again.

    Raises:
      ValueError: if the folder has a checkpoint, a file of a name that is needed, or
        an unfinished checkpoint of another plan, or another process writes there, or
        a dtype is not of the format.
      OSError: if there is no room, or no permission.
    """

    def __init__(
        self,
        out: epath.PathLike,
        specs: Mapping[str, TensorSpec],
        *,
        plan: str,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        beside: Iterable[str] = (),
        buffer_bytes: int = 64 << 20,
    ):
        self.path = _target.local_folder(out)
        self._layout = Layout(specs, shard_bytes, metadata)
        self._lock = threading.Lock()
        self._given: dict[str, list[tuple[int, int]]] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._complete: set[str] = set()
        self._dirty = 0
        self._files: dict[str, int] = {}
        self._new = not self.path.exists()
        self.done: frozenset[str] = frozenset()
        with _plainly(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(
                self.path / _journal.FILE, self._layout.digest(plan), restart=overwrite
            )
        self._spool = Spool(self._store, buffer_bytes)
        try:
            with _plainly(self.path):
                if self._journal.fresh and not overwrite:
                    _target.refuse_loss(self.path, beside)
                self.done = self._proven()
                self._reserve()
                self._skip_empty()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Leaves what an earlier run did, and else nothing."""
        try:
            if not self._journal.finished:
                for file in self._files:
                    self._partial(file).unlink(missing_ok=True)
                self._journal.remove()
        finally:
            self._close()
        if self._new:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _skip_empty(self) -> None:
        """Tensors without entries are complete from the start."""
        for name, place in self._layout.places.items():
            if not place.spec.size and name not in self.done:
                self._journal.add(name, [])
                self.done |= {name}

    def _partial(self, file: str) -> pathlib.Path:
        return _target.partial(self.path, file)

    def _proven(self) -> frozenset[str]:
        """Tensors of the journal whose bytes are on the disk as it says."""
        found: set[str] = set()
        for file, size in self._layout.sizes.items():
            names = [n for n, p in self._layout.places.items() if p.file == file]
            claimed = [name for name in names if name in self._journal.finished]
            partial, final = self._partial(file), self.path / file
            if partial.exists():
                found |= set(self._intact(partial, size, claimed))
            elif final.exists() and claimed == names:
                # Perhaps an earlier run was killed when it had renamed this file.
                if self._intact(final, size, names) != names:
                    continue
                final.rename(partial)
                found |= set(names)
        return frozenset(found)

    def _intact(self, path: pathlib.Path, size: int, names: list[str]) -> list[str]:
        if not names or path.stat().st_size != size:
            return []
        with path.open("rb") as f:
            return [name for name in names if self._matches(f, name)]

    def _matches(self, f, name: str) -> bool:
        """Whether the bytes of a tensor have the checksums of the journal."""
        _, offset, spec = self._layout.places[name]
        end = 0
        for start, stop, wanted in self._journal.finished[name]:
            if start != end or stop > spec.nbytes:
                return False
            end, crc = stop, 0
            f.seek(offset + start)
            for at in range(start, stop, _READ):
                crc = zlib.crc32(f.read(min(_READ, stop - at)), crc)
            if crc != wanted:
                return False
        return end == spec.nbytes

    def _reserve(self) -> None:
        """Opens every file at its full size, header in place."""
        for stale in self.path.glob(".*.safetensors.partial"):
            if stale.name not in {f".{file}.partial" for file in self._layout.sizes}:
                stale.unlink()
        for file, size in self._layout.sizes.items():
            fd = os.open(self._partial(file), os.O_RDWR | os.O_CREAT, 0o666)
            self._files[file] = fd
            os.ftruncate(fd, size)
            self._allocate(fd, size)
            _put(fd, 0, memoryview(self._layout.headers[file]))

    def _allocate(self, fd: int, size: int) -> None:
        """Makes sure of the room for a file."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
                return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                total = sum(self._layout.sizes.values())
                raise OSError(
                    f"cannot write {self.path}: {error.strerror}: the checkpoint has "
                    f"{total:,} bytes"
                ) from None
        if size > shutil.disk_usage(self.path).free:
            raise OSError(f"cannot write {self.path}: no room for {size:,} bytes")

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Hands over a run of entries of a tensor; returns before they are written.

        Args:
          name: of the tensor.
          start: first entry, in row-major order.
          values: [n] in the dtype of the tensor; must not be changed any more.

        Raises:
          ValueError: for a tensor that is not in the specs or is done, another dtype,
            or entries that it does not have or that were written before.
          OSError: if an earlier chunk could not be written.
        """
        where = f"CheckpointWriter: {name!r}"
        if name not in self._layout.places:
            raise ValueError(f"{where} is not in the specs")
        spec, values = self._layout.places[name].spec, np.asarray(values)
        if values.dtype != spec.dtype or values.ndim != 1:
            raise ValueError(
                f"{where} wants a flat chunk of {spec.dtype}, found {values.dtype}"
                f"{list(values.shape)}"
            )
        stop, width = start + values.size, spec.dtype.itemsize
        if start < 0 or stop > spec.size:
            raise ValueError(
                f"{where} has {spec.size} entries, found {start} to {stop}"
            )
        if not values.size:
            return
        if name in self.done:
            raise ValueError(f"{where} is done already")
        with self._lock:
            self._note(name, start, stop)
        raw = np.ascontiguousarray(values).view(np.uint8)
        with _plainly(self.path):
            self._spool.put((name, start * width, raw), raw.nbytes)

    def _note(self, name: str, start: int, stop: int) -> None:
        """Refuses entries that were written before; joins runs that touch."""
        given = self._given.setdefault(name, [])
        if any(start < end and begin < stop for begin, end in given):
            raise ValueError(
                f"CheckpointWriter: {name!r}: {start} to {stop} was written before"
            )
        for i, (begin, end) in enumerate(given):
            if end == start:
                given[i] = (begin, stop)
                return
        given.append((start, stop))

    def _store(self, item: tuple[str, int, np.ndarray]) -> None:
        """On the thread: writes a chunk, and notes a tensor that it completes."""
        name, start, raw = item
        file, offset, spec = self._layout.places[name]
        _put(self._files[file], offset + start, raw.data)
        self._dirty += raw.nbytes
        if self._dirty >= _DIRTY:  # While others compute, so that little is left.
            os.fsync(self._files[file])
            self._dirty = 0
        pieces = self._pieces.setdefault(name, [])
        stop = start + raw.nbytes
        for i, piece in enumerate(pieces):
            if piece.stop == start:
                pieces[i] = Piece(piece.start, stop, zlib.crc32(raw, piece.crc))
                break
        else:
            pieces.append(Piece(start, stop, zlib.crc32(raw)))
        if sum(piece.stop - piece.start for piece in pieces) == spec.nbytes:
            self._journal.add(name, sorted(pieces))
            self._complete.add(name)

    def finish(self, files: Mapping[str, bytes | pathlib.Path] | None = None) -> None:
        """Turns the parts into a checkpoint: the last step is what makes it whole.

        Args:
          files: name -> contents, or a file to copy, that belong beside the weights.

        Raises:
          ValueError: naming tensors that were not written completely.
          OSError: if anything cannot be written; the run can be repeated then.
        """
        files = dict(files or {})
        with _plainly(self.path):
            self._spool.drain()
            self._check_complete()
            for file in self._layout.sizes:
                os.fsync(self._files[file])
                self._verify(file)
            _target.retire(self.path, files)
            if self._layout.index is not None:
                self._rename()
                last = {n: files.pop(n) for n in [CONFIG] if n in files}
                last[shards.INDEX] = self._layout.index.encode()
                files |= last
            for name, content in files.items():
                self._place(name, content)
            if self._layout.index is None:
                self._rename()
            _sync(self.path)
            self._journal.remove()
        self._close()

    def _check_complete(self) -> None:
        missing = sorted(set(self._layout.places) - self.done - self._complete)
        if missing:
            raise ValueError(
                f"CheckpointWriter: not written completely: {shards.some(missing)}"
            )

    def _verify(self, file: str) -> None:
        """What is on the disk has the header and the size that were planned."""
        header = self._layout.headers[file]
        found = safetensors.SafetensorsFile(self._partial(file))
        size = os.fstat(self._files[file]).st_size
        if (
            size != self._layout.sizes[file]
            or os.pread(self._files[file], len(header), 0) != header
        ):
            raise OSError(f"cannot write {found.path}: it has changed on the disk")

    def _rename(self) -> None:
        for file in self._layout.sizes:
            self._partial(file).rename(self.path / file)
        _sync(self.path)

    def _place(self, name: str, content: bytes | pathlib.Path) -> None:
        """Writes or copies a file, and renames it into place."""
        target = self.path / name
        if self.path not in target.parents or ".." in target.parts:
            raise ValueError(f"CheckpointWriter: {name!r} is no name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            shutil.copyfile(content, partial)
        _sync(partial)
        partial.rename(target)

    def _close(self) -> None:
        self._spool.close()
        self._journal.close()
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees everything; without `finish`, what was done can be continued."""
        try:
            if error is None and self._files:
                with _plainly(self.path):
                    self._spool.drain()
        finally:
            self._close()


@contextlib.contextmanager
def _plainly(path: pathlib.Path) -> Iterator[None]:
    """Errors of the operating system in one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # One of ours.
            raise
        named = error.filename not in (None, str(path))
        detail = f" ({error.filename})" if named else ""
        raise OSError(
            f"cannot write {path}: {error.strerror or error}{detail}"
        ) from error


def _put(fd: int, offset: int, data: memoryview) -> None:
    """Writes all of the bytes, however many calls it takes."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _sync(path: pathlib.Path) -> None:
    """Returns once the disk has a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
