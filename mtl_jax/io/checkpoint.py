"""Checkpoints of any tree of arrays, written by Orbax in the background.

A checkpoint is a folder named after its step. Beside the arrays it holds a manifest,
the name, shape and dtype of every leaf and a checksum of its bits, so that a tree of
another shape is refused by name before anything is read, and damaged data after.
"""

import gc
import math
import re
import sys
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from mtl_jax import tree as mtl_tree

__all__ = ["Checkpointer"]

_STATE, _META = "state", "meta"


class Checkpointer:
    """Saves and restores numbered checkpoints in one folder.

    Restored trees equal saved ones bit for bit, typed PRNG keys included. On several
    processes every process makes the same calls.

    Args:
      directory: local path or URL that `etils.epath` knows, such as `gs://...`.
      keep: number of newest checkpoints kept.
    """

    def __init__(self, directory: Any, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"Checkpointer: keep wants at least 1, found {keep}")
        path = epath.Path(directory)
        if not path.is_absolute() and "://" not in str(directory):
            path = path.absolute()
        self.directory = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Checkpointer: cannot write to {path}: {error.strerror or error}"
            ) from None
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True
            ),
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(),
                _META: ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: Any, meta: dict[str, Any] | None = None) -> None:
        """Starts to save; returns once the arrays may be changed or donated.

        Args:
          step: number of the checkpoint; one that exists is left as it is.
          tree: tree of arrays.
          meta: plain JSON data kept beside it.
        """
        if step in self.steps():
            return
        manifest = {
            name: [str(x.dtype), list(x.shape)] for name, x in _named(tree).items()
        }
        note = {"leaves": manifest, "sums": checksums(tree), "meta": meta or {}}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(_nonempty(tree)),
                    _META: ocp.args.JsonSave(note),
                }
            ),
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The plain data saved with a checkpoint."""
        return self._note(step)["meta"]

    def restore(self, like: Any, step: int | None = None) -> Any:
        """Reads a checkpoint into arrays placed as `like` says.

        Args:
          like: tree of arrays or of `jax.ShapeDtypeStruct` with shardings.
          step: which checkpoint; the newest one by default.

        Returns:
          A tree with the structure of `like`.

        Raises:
          ValueError: naming the leaf, when the checkpoint holds other leaves, shapes or
            dtypes, or when its data are damaged or not there.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise ValueError(
                f"restore: no checkpoint {'' if step is None else f'{step} '}in "
                f"{self.directory}; found steps {self.steps()}"
            )
        note = self._note(step)
        self._compare(step, note["leaves"], like)
        failure, restored = None, {}
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{_STATE: ocp.args.StandardRestore(_nonempty(like))}
                ),
            )
        except Exception as error:  # Orbax and tensorstore raise many kinds.
            failure = str(error)
        if failure is not None:
            _drop_unfinished_reads()
            raise self._damaged(step, failure, like)
        tree = jax.tree.map(
            lambda x, read: jnp.zeros(x.shape, x.dtype) if read is None else read,
            like,
            restored[_STATE],
        )
        for name, total in checksums(tree).items():
            if total != note["sums"].get(name):
                raise self._damaged(step, f"{name!r} has changed since it was written")
        return tree

    def wait(self) -> None:
        """Returns once everything saved so far is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _note(self, step: int) -> dict[str, Any]:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_META: ocp.args.JsonRestore()})
            )
            note = restored[_META]
            if not {"leaves", "sums", "meta"} <= set(note):
                raise KeyError(f"found {sorted(note)}")
        except Exception as error:  # Orbax raises many kinds here.
            raise self._damaged(
                step, f"its manifest cannot be read ({error})"
            ) from error
        return note

    def _compare(self, step: int, saved: dict[str, Any], like: Any) -> None:
        wanted = _named(like)
        for name, x in wanted.items():
            if name not in saved:
                raise ValueError(
                    f"restore: {name!r} is {x.dtype}{list(x.shape)} here, "
                    f"but not in checkpoint {self.directory / str(step)}"
                )
            dtype, shape = saved[name]
            if (dtype, tuple(shape)) != (str(x.dtype), tuple(x.shape)):
                raise ValueError(
                    f"restore: {name!r} is {x.dtype}{list(x.shape)} here, "
                    f"{dtype}{shape} in checkpoint {self.directory / str(step)}"
                )
        extra = sorted(set(saved) - set(wanted))
        if extra:
            raise ValueError(
                f"restore: {extra[0]!r} is in checkpoint {self.directory / str(step)}, "
                f"but not here ({len(extra)} such leaves)"
            )

    def _damaged(self, step: int, cause: Any, like: Any = None) -> ValueError:
        text = " ".join(str(cause).split())
        hits = [
            name
            for name in _named(like)
            if re.search(rf"\b{re.escape(name.replace('/', '.'))}\b", text)
        ]
        named = f" at {max(hits, key=len)!r}" if hits else ""
        reason = text.split(". See full TensorStore")[0][:300]
        return ValueError(
            f"restore: checkpoint {self.directory / str(step)} is damaged{named}: "
            f"{reason}; delete that folder to go on from the one before it"
        )


def _drop_unfinished_reads() -> None:
    """Frees the reads a failed restore left behind, which complain when they go."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def checksums(tree: Any) -> dict[str, int]:
    """One number per leaf that changes with any single bit of it, on any layout."""
    return {name: int(x) for name, x in _named(jax.device_get(_sums(tree))).items()}


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
    """Sum over elements of bits times odd position weights, modulo 2^32."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    width = x.dtype.itemsize
    if width == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
        x = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    weight = jnp.ones(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        weight = weight * (2 * place + 1)
    return jnp.sum(x * weight, dtype=jnp.uint32)


def _nonempty(tree: Any) -> Any:
    """Arrays without elements are None to Orbax, which cannot hold them."""
    return jax.tree.map(lambda x: x if math.prod(x.shape) else None, tree)


def _named(tree: Any) -> dict[str, Any]:
    return {
        mtl_tree.path_str(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
