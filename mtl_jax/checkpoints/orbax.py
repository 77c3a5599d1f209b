"""Checkpoints that `io.checkpoint.Checkpointer` wrote, read tensor by tensor."""

import collections
import hashlib
import json
import os
import threading

import numpy as np
from etils import epath

from mtl_jax.checkpoints.source import Source, TensorSpec
from mtl_jax.io import shards

__all__ = ["is_checkpoint", "open_checkpoint"]

_MANIFEST = "meta/metadata"
_LAYOUT = "state/_METADATA"
_PARAMS = "params/"
_CACHED = 4  # Tensors that are kept: they are stored, and so read, as a whole.


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether a folder is one step of a checkpointer, or has such steps."""
    return bool(_steps(epath.Path(path)))


def _steps(path):
    found = [path] if (path / _MANIFEST).is_file() else []
    children = sorted(
        (child for child in path.iterdir() if child.name.isdigit()),
        key=lambda child: int(child.name),
    )
    return found or [child for child in children if (child / _MANIFEST).is_file()]


def open_checkpoint(path: epath.PathLike) -> Source:
    """Opens one step of a checkpointer, or the newest one in its folder.

    Tensors are read as a whole, the latest few are kept, and each is compared with its
    checksum.

    Raises:
      ValueError: for a manifest that cannot be read, or leaves that are no arrays.
    """
    step = _steps(epath.Path(path))[-1]
    note, layout = (shards.read_json(step / name) for name in (_MANIFEST, _LAYOUT))
    if not {"leaves", "sums"} <= set(note) or not layout.get("use_ocdbt"):
        raise ValueError(f"{step}: not written by io.checkpoint.Checkpointer")
    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    leaves = dict(note["leaves"])
    below = [name for name in leaves if name.startswith(_PARAMS)]
    store, views = _Store(step, driver, note["sums"]), {}
    for name in below or leaves:
        dtype, shape = leaves[name]
        if dtype.startswith("key<"):
            raise ValueError(f"{step}: {name!r} is a random key, not an array")
        spec = TensorSpec(tuple(shape), np.dtype(dtype))
        views[name.removeprefix(_PARAMS)] = _StoredView(store, name, spec)
    text = json.dumps([note["leaves"], note["sums"]], sort_keys=True)
    return Source(
        step, views, fingerprint=hashlib.sha256(text.encode()).hexdigest()[:32]
    )


class _Store:
    """Reads tensors of one step, and keeps the latest few."""

    def __init__(self, step, driver, sums):
        self._step, self._driver, self._sums = step, driver, sums
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, spec: TensorSpec) -> np.ndarray:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._read(name, spec)
            self._kept.move_to_end(name)
            while len(self._kept) > _CACHED:
                self._kept.popitem(last=False)
            return self._kept[name]

    def _read(self, name, spec):
        import tensorstore

        from mtl_jax.io import checkpoint

        if not spec.size:  # Orbax does not store them.
            return np.zeros(spec.shape, spec.dtype)
        base = str(self._step / "state")
        base = base if "://" in base else f"file://{os.path.abspath(base)}"
        kvstore = {"driver": "ocdbt", "base": base}
        where = {"kvstore": kvstore, "path": name.replace("/", ".")}
        try:
            found = tensorstore.open({"driver": self._driver, **where}).result()
            array = np.asarray(found.read().result())
        except Exception as error:  # The library raises many kinds.
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"{self._step}: cannot read {name!r}: {text}") from None
        if TensorSpec(array.shape, array.dtype) != spec:
            raise ValueError(
                f"{self._step}: {name!r} is {array.dtype}{list(array.shape)}, its "
                f"manifest says {spec.dtype}{list(spec.shape)}"
            )
        if checkpoint.checksums({"": array})[""] != self._sums.get(name):
            raise ValueError(f"{self._step}: {name!r} has changed since it was written")
        return array


class _StoredView:
    """A tensor of a step."""

    def __init__(self, store: _Store, name: str, spec: TensorSpec):
        self._store, self._name, self.spec = store, name, spec

    def flat(self, start: int, stop: int) -> np.ndarray:
        return self._store.get(self._name, self.spec).reshape(-1)[start:stop]

    def whole(self) -> np.ndarray:
        return self._store.get(self._name, self.spec)
