"""Checkpoints into a bank and out of it, one tensor after the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtl_jax.checkpoints import _bank, _bank_methods
from mtl_jax.checkpoints.source import Source, TensorSpec, TensorView

__all__ = ["Packer", "copied", "restored"]

OWN, BASE = "own", "base"


def copied(view: TensorView) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor as it is, as (start, flat values); an empty one has one empty part."""
    size = view.spec.size
    for start, stop in _bank_methods.blocks(size) if size else [(0, 0)]:
        yield start, view.flat(start, stop)


class Packer:
    """Decides how each tensor is kept, and fills the bank.

    Attributes:
      entries: tensor -> how it is kept, in the order of the experts.
      specs: of the tensors of the bank.
      checksums: tensor -> CRC-32 of the base's, of those stored so far.
    """

    def __init__(
        self, how: str, method: Any, base: Source, tasks: Mapping[str, Source]
    ):
        self._how, self._method = how, method
        self._base, self._tasks = base, dict(tasks)
        self.checksums: dict[str, int] = {}
        self.entries: dict[str, _bank.Entry] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._parts: dict[str, dict[Any, TensorSpec]] = {}
        for name in dict.fromkeys(n for source in tasks.values() for n in source):
            found = [_stored(source, name) for source in tasks.values()]
            kind, parts = self._kind(name, found)
            if kind == OWN:
                found = [parts.get(t) for t in range(len(found))]
            self.entries[name] = _bank.Entry.of(kind, found)
            self.specs |= {_bank.key(kind, p, name): s for p, s in parts.items()}
            self._parts[name] = parts

    def keys(self, name: str) -> set[str]:
        """Names in the bank that `store` fills for a tensor."""
        return {_bank.key(self.entries[name].how, p, name) for p in self._parts[name]}

    def _kind(
        self, name: str, found: Sequence[TensorSpec | None]
    ) -> tuple[str, dict[Any, TensorSpec]]:
        """How to keep a tensor, and its parts in the bank."""
        base = self._base[name].spec if name in self._base else None
        views = [source.get(name) for source in self._tasks.values()]
        own = {t: view.spec for t, view in enumerate(views) if view is not None}
        if base is None or len(own) < len(found):
            return OWN, own
        if any(tuple(spec.shape) != tuple(base.shape) for spec in own.values()):
            return OWN, own
        if all(map(_is_narrow_float, (base, *own.values()))) and base.size:
            dtypes = [spec.dtype for spec in found if spec is not None]
            parts = self._method.parts(base, dtypes)
            return (OWN, own) if parts is None else (self._how, parts)
        discrete = not jnp.issubdtype(base.dtype, jnp.inexact)
        same = all(spec.dtype == base.dtype for spec in own.values())
        if discrete and same and self._all_equal(name):
            return BASE, {}
        return OWN, own

    def _all_equal(self, name: str) -> bool:
        views = [self._base[name], *(source[name] for source in self._tasks.values())]
        for start, stop in _bank_methods.blocks(views[0].spec.size):
            first, *rest = (view.flat(start, stop) for view in views)
            if not all(np.array_equal(first, other) for other in rest):
                return False
        return True

    def store(self, name: str, put: _bank_methods.Put) -> _bank_methods.Errors:
        """Fills the parts of one tensor by `put(name in the bank, start, values)`.

        Returns:
          What was lost; nothing for tensors that are kept as they are.

        Raises:
          ValueError: NaN or infinity, naming the tensor and the model.
        """
        entry = self.entries[name]
        kind, tasks = entry.how, list(self._tasks)
        errors = _bank_methods.Errors.zero(len(tasks))
        if kind == OWN:
            for t, source in enumerate(self._tasks.values()):
                for start, values in copied(source[name]) if name in source else ():
                    put(_bank.key(OWN, t, name), start, values)
            return errors
        base = _bank.Summed(self._base[name])
        if kind == BASE:
            for _ in copied(base):
                pass
        else:
            views = [source[name] for source in self._tasks.values()]

            def part(label: str, start: int, values: np.ndarray) -> None:
                put(_bank.key(kind, label, name), start, values)

            try:
                errors = self._method.compress(base, views, self._parts[name], part)
            except _bank_methods.NotFiniteError as error:
                who = "the base" if not error.model else tasks[error.model - 1]
                raise ValueError(
                    f"compress: {name!r} of {who} holds NaN or infinity"
                ) from None
        self.checksums[name] = base.checksum
        return errors


def restored(
    bank: _bank.Bank,
    tensors: Mapping[str, TensorView],
    name: str,
    task: int,
    base: Mapping[str, TensorView],
    method: Any,
) -> Iterator[tuple[int, np.ndarray]]:
    """One tensor of one task, as (start, flat values) in order.

    Args:
      bank: description.
      tensors: of the bank.
      name: of the tensor.
      task: index.
      base: the base's tensors; checked against the checksum when all is read.
      method: that of the bank.

    Raises:
      ValueError: the base's tensor is not that which the bank was made with.
    """
    entry = bank.entries[name]
    if entry.how == OWN:
        yield from copied(tensors[_bank.key(OWN, task, name)])
        return
    origin = _bank.Summed(base[name])
    if entry.how == BASE:
        chunks = copied(origin)
    else:
        parts = _bank.Parts(tensors, entry.how, name)
        chunks = method.restore(origin, parts, task, entry.spec(task).dtype)
    # The last chunk waits for the checksum: without it no tensor is whole.
    last = next(chunks)
    for chunk in chunks:
        yield last
        last = chunk
    if origin.checksum != bank.checksums[name]:
        raise ValueError(
            f"extract: {name!r} of the base is not that which the bank was made with"
        )
    yield last


def _stored(source: Source, name: str) -> TensorSpec | None:
    """What a task's tensor is in its files; with an adapter added, it is wider."""
    return source.stored.get(name) if name in source else None


def _is_narrow_float(spec: TensorSpec) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.floating) and spec.dtype.itemsize <= 4
