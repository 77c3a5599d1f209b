"""Adapters of PEFT into a bank and out of it: their factors over a shared basis."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.checkpoints import _bank, _bank_methods, _bank_rmm
from mtl_jax.checkpoints._bank_tensors import OWN, copied
from mtl_jax.checkpoints.source import Source, TensorSpec, TensorView
from mtl_jax.transforms import merging

__all__ = ["AdapterPacker", "restored_adapter"]

_HOW = "rmm"
# lora_A is [r, in, ...], lora_B [out, r, ...]; the embedding's are named otherwise.
_FIRST = re.compile(r"(^|\.)lora_(embedding_)?A(?=\.|$)")


class _Pair(NamedTuple):
    """Names of the two factors of one adapted tensor."""

    a: str
    b: str


def _pairs(names: Sequence[str]) -> list[_Pair]:
    found = []
    for name in names:
        other = _FIRST.sub(r"\1lora_\2B", name)
        if other != name and other in names:
            found.append(_Pair(name, other))
    return found


def _loras(pair: _Pair, tasks: Sequence[Source]) -> list[dict[str, np.ndarray]]:
    """{"a": [in, r], "b": [r, out]} in float32, of every task."""
    loras = []
    for source in tasks:
        a, b = (source[n].whole().astype(np.float32) for n in pair)
        loras.append({"a": a.reshape(a.shape[0], -1).T, "b": _rows(b).T})
    return loras


def _rows(b: np.ndarray) -> np.ndarray:
    return b.reshape(b.shape[0], -1)


class AdapterPacker:
    """Decides how each tensor of the adapters is kept, and fills the bank.

    Attributes:
      entries: tensor -> how it is kept.
      specs: of the tensors of the bank.
      checksums: none; adapters are restored without their base.
    """

    def __init__(self, method: _bank_rmm.Rmm, tasks: Mapping[str, Source]):
        self._method, self._tasks = method, dict(tasks)
        self.checksums: dict[str, int] = {}
        self.entries: dict[str, _bank.Entry] = {}
        self.specs: dict[str, TensorSpec] = {}
        sources = list(tasks.values())
        names = list(dict.fromkeys(n for source in sources for n in source))
        shared = [n for n in names if all(n in source for source in sources)]
        self._pairs = {
            pair.a: pair for pair in _pairs(shared) if self._fits(pair, sources)
        }
        joint = {name for pair in self._pairs.values() for name in pair}
        for name in names:
            found = [_spec(source, name) for source in sources]
            self.entries[name] = _bank.Entry.of(_HOW if name in joint else OWN, found)
            if name not in joint:
                own = {t: spec for t, spec in enumerate(found) if spec is not None}
                self.specs |= {_bank.key(OWN, t, name): s for t, s in own.items()}
        for pair in self._pairs.values():
            parts = _bank_rmm.bank_parts(*self._layout(pair))
            self.specs |= {_bank.key(_HOW, p, pair.a): s for p, s in parts.items()}

    def keys(self, name: str) -> set[str]:
        """Names in the bank that `store` fills for a tensor."""
        return {key for key in self.specs if key.endswith(f"/{name}")}

    @staticmethod
    def _fits(pair: _Pair, sources: Sequence[Source]) -> bool:
        """Whether the factors are matrices of one size but for the rank."""
        a, b = ([source[n].spec for source in sources] for n in pair)
        narrow = all(
            jnp.issubdtype(s.dtype, jnp.floating) and s.dtype.itemsize <= 4
            for s in (*a, *b)
        )
        return (
            narrow
            and len({tuple(s.shape[1:]) for s in a}) == 1
            and len({s.shape[0] for s in b}) == 1
            and all(
                math.prod(y.shape[1:]) == x.shape[0] > 0
                for x, y in zip(a, b, strict=True)
            )
        )

    def _layout(self, pair: _Pair) -> tuple[tuple[int, int], int, int, int, Any]:
        """(sides, rank, tasks, p, dtype) of the bank of a pair."""
        a, b = ([s[n].spec for s in self._tasks.values()] for n in pair)
        sides = math.prod(a[0].shape[1:]), b[0].shape[0]
        rank, tasks = max(spec.shape[0] for spec in a), len(a)
        p = min(self._method.basis, rank, tasks - 1)
        dtype = self._method.dtype
        if dtype is None:
            dtype = _bank_methods.widest(spec.dtype for spec in (*a, *b))
        return sides, rank, tasks, p, dtype

    def store(self, name: str, put: _bank_methods.Put) -> _bank_methods.Errors:
        """Fills the parts of one tensor, or of the pair of which it is the first.

        Returns:
          What was lost of the products of a pair.

        Raises:
          ValueError: NaN or infinity, naming the tensor and the task.
        """
        sources = list(self._tasks.values())
        errors = _bank_methods.Errors.zero(len(sources))
        if self.entries[name].how == OWN:
            for t, source in enumerate(sources):
                for start, values in copied(source[name]) if name in source else ():
                    put(_bank.key(OWN, t, name), start, values)
            return errors
        if (pair := self._pairs.get(name)) is None:
            return errors  # Stored with the first factor.
        loras = _loras(pair, sources)
        for task, each in zip(self._tasks, loras, strict=True):
            for factor, values in zip(pair, each.values(), strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"compress: {factor!r} of {task} holds NaN or infinity"
                    )
        *_, p, dtype = self._layout(pair)
        given = [merging.lora_align(loras)] if self._method.align else [loras]
        bank = merging.rmm_basis(jax.tree.map(jnp.asarray, given[0]), p)

        def part(label: str, start: int, values: np.ndarray) -> None:
            put(_bank.key(_HOW, label, pair.a), start, values)

        _bank_rmm.fill(bank, part, dtype)
        bank = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), bank)
        for t, each in enumerate(loras):
            found = jax.tree.map(np.asarray, merging.rmm_restore(bank, t))
            rank = each["a"].shape[1]
            a, b = found["a"][:, :rank], found["b"][:rank]
            errors.total[t] = _square(each["a"], each["b"])
            both = np.concatenate([a, each["a"]], 1), np.concatenate([b, -each["b"]])
            errors.lost[t] = _square(*both)
        return errors


def _spec(source: Source, name: str) -> TensorSpec | None:
    return source[name].spec if name in source else None


def _square(a: np.ndarray, b: np.ndarray) -> float:
    """|a b|^2, of factors only."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sum((a.T @ a) * (b @ b.T)))


def restored_adapter(
    bank: _bank.Bank, tensors: Mapping[str, TensorView], task: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one adapter, by name.

    A rank below that of the bank is cut out of it: the others are padded in the bank.
    """
    names = [n for n, entry in bank.entries.items() if entry.has(task)]
    for name in names:
        if bank.entries[name].how == OWN:
            yield name, tensors[_bank.key(OWN, task, name)].whole()
    joint = [name for name in names if bank.entries[name].how == _HOW]
    for pair in _pairs(joint):
        parts = _bank.Parts(tensors, _HOW, pair.a)
        found = merging.rmm_restore(_bank_rmm.read_bank_parts(parts, task), 0)
        a, b = (bank.entries[name].spec(task) for name in pair)
        rank = a.shape[0]
        first = np.asarray(found["a"])[:, :rank].T
        second = np.asarray(found["b"])[:rank].T
        yield pair.a, first.reshape(a.shape).astype(a.dtype)
        yield pair.b, second.reshape(b.shape).astype(b.dtype)
