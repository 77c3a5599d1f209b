"""Ways to keep several fine-tunings of one tensor in less room, chunk by chunk.

A method says which tensors of a bank stand for one tensor of the checkpoints, fills
them from the base and the experts, and restores one expert from them and the base. It
sees one chunk at a time where it is element-wise; all chunks have one of a few sizes,
so that a handful of compiled programs serves every tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import kernels
from mtl_jax.checkpoints.source import TensorSpec, TensorView
from mtl_jax.transforms import merging

__all__ = [
    "BitDelta",
    "Errors",
    "Method",
    "NotFiniteError",
    "Tall",
    "blocks",
    "check_finite",
    "widest",
]

Put = Callable[[str, int, np.ndarray], None]

_SIZES = (1 << 12, 1 << 16, 1 << 20)  # Entries of a chunk, multiples of _ROW.
_ROW = 1 << 10


class NotFiniteError(ValueError):
    """NaN or infinity in the base (model 0) or in expert model - 1."""

    def __init__(self, model: int):
        super().__init__(f"model {model} holds NaN or infinity")
        self.model = model


@dataclasses.dataclass
class Errors:
    """Sums of squares per task, in float64.

    Attributes:
      lost: [T], of the change that is restored minus the change.
      total: [T], of the change.
    """

    lost: np.ndarray
    total: np.ndarray

    @classmethod
    def zero(cls, tasks: int) -> "Errors":
        """Nothing lost of nothing."""
        return cls(np.zeros(tasks), np.zeros(tasks))

    def add(self, other: "Errors") -> None:
        """Adds another tensor's."""
        self.lost = self.lost + other.lost
        self.total = self.total + other.total

    @property
    def relative(self) -> list[float]:
        """|restored - change| / |change| per task; 0 where nothing changed."""
        pairs = zip(self.lost, self.total, strict=True)
        return [
            math.sqrt(max(lost, 0.0) / total) if total else 0.0 for lost, total in pairs
        ]


class Method(Protocol):
    """What `compress` and `extract` ask of a way to keep tensors."""

    def parts(
        self, spec: TensorSpec, dtypes: Sequence[np.dtype]
    ) -> dict[str, TensorSpec] | None:
        """Tensors that stand for one, by part.

        Args:
          spec: of the base, floating point of at most 32 bits.
          dtypes: of the experts.

        Returns:
          Part -> spec; None where the tensor is better kept as it is.
        """
        ...

    def compress(
        self,
        base: TensorView,
        experts: Sequence[TensorView],
        parts: Mapping[str, TensorSpec],
        put: Put,
    ) -> Errors:
        """Fills the parts by `put(part, start, flat values)`, reading the base once.

        Raises:
          NotFiniteError: the base or an expert holds NaN or infinity.
        """
        ...

    def restore(
        self,
        base: TensorView,
        parts: Any,
        task: int,
        dtype: np.dtype,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor of one task, as (start, flat values) in order."""
        ...


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The first of those of most bytes."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks."""
    length = _SIZES[-1]
    for start in range(0, size, length):
        yield start, min(start + length, size)


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    if values.size == length:
        return values
    out = np.zeros(length, values.dtype)
    out[: values.size] = values
    return out


def _length(count: int) -> int:
    return next(size for size in _SIZES if size >= count)


def _squares(values: Iterable[np.ndarray]) -> np.ndarray:
    """Sums of squares of T arrays float32 [n] -> [T] float64."""
    found = []
    for each in values:
        rows = each.reshape(-1, _ROW)
        squares = np.einsum("rk,rk->r", rows, rows)
        found.append(squares.astype(np.float64).sum())
    return np.array(found)


def check_finite(total: np.ndarray, models: Iterable[np.ndarray]) -> None:
    """Raises for the first model with NaN or infinity, the base being the first.

    Args:
      total: sums over the changes: where they are finite, everything is.
      models: values of the base and the experts.
    """
    if np.isfinite(total).all():
        return
    for model, values in enumerate(models):
        if not np.isfinite(values.astype(np.float32)).all():
            raise NotFiniteError(model)


def _taus(base: jax.Array, experts: Sequence[jax.Array]) -> jax.Array:
    wide = base.astype(jnp.float32)
    return merging.task_vectors(wide, list(experts), check_finite=False)


# Tasks one by one, not stacked, and sums on the host: XLA's on CPUs are not vectorised,
# and it computes again whatever they are of, which made a chunk four times slower.
@functools.partial(jax.jit, static_argnames="stored")
def _tall_chunk(base, experts, scales, stored):
    """Chunk [n] of every model -> merged [n]; masks, errors and taus of every task."""
    taus = [_taus(base, [expert]) for expert in experts]
    total = functools.reduce(jnp.add, taus)[0]
    merged = total.astype(stored)
    wide = merged.astype(jnp.float32)
    packed, lost = [], []
    for tau, scale in zip(taus, scales, strict=True):
        mask = merging.tall_masks(tau, wide, scale=scale, check_finite=False)
        packed.append(kernels.pack_bits(mask[0]))
        lost.append(merging.restore_delta(wide, mask[0]) - tau[0])
    return merged, packed, lost, [tau[0] for tau in taus]


@functools.partial(jax.jit, static_argnames="dtype")
def _tall_restore(base, merged, packed, dtype):
    wide = base.astype(jnp.float32)
    moved = kernels.masked_restore(
        wide, merged.astype(jnp.float32), packed, implementation="xla"
    )
    return moved.astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tall:
    """The sum of the changes, and for every task one bit per entry.

    Attributes:
      scales: lambda of every task, see `merging.tall_masks`.
      dtype: of the sum; None: the widest of the experts.
    """

    scales: tuple[float, ...]
    dtype: np.dtype | None = None

    def parts(self, spec, dtypes):  # noqa: D102
        stored = widest(dtypes) if self.dtype is None else self.dtype
        if stored.itemsize < 2:
            stored = jnp.dtype(jnp.bfloat16)
        num = kernels.num_bytes(spec.size)
        return {
            "merged": TensorSpec(spec.shape, stored),
            "masks": TensorSpec((len(dtypes), num), np.dtype(np.uint8)),
        }

    def compress(self, base, experts, parts, put):  # noqa: D102
        size, stored = base.spec.size, parts["merged"].dtype
        scales = [np.float32(scale) for scale in self.scales]
        row, errors = kernels.num_bytes(size), Errors.zero(len(experts))
        for start, stop in blocks(size):
            length = _length(stop - start)
            chunk = [_padded(x.flat(start, stop), length) for x in (base, *experts)]
            merged, packed, lost, taus = jax.device_get(
                _tall_chunk(chunk[0], chunk[1:], scales, stored)
            )
            total = _squares(taus)
            check_finite(total, chunk)
            put("merged", start, merged[: stop - start])
            for t, bits in enumerate(packed):
                used = bits[: kernels.num_bytes(stop - start)]
                put("masks", t * row + start // 8, used)
            errors.add(Errors(_squares(lost), total))
        return errors

    def restore(self, base, parts, task, dtype):  # noqa: D102
        size = base.spec.size
        row = kernels.num_bytes(size)
        for start, stop in blocks(size):
            length, first = _length(stop - start), task * row + start // 8
            used = kernels.num_bytes(stop - start)
            bits = parts["masks"].flat(first, first + used)
            values = _tall_restore(
                _padded(base.flat(start, stop), length),
                _padded(parts["merged"].flat(start, stop), length),
                _padded(bits, length // 8),
                dtype,
            )
            yield start, np.asarray(values)[: stop - start]


@jax.jit
def _bitdelta_chunk(base, experts, count):
    """Chunk [n] of every model, `count` of it used -> signs and |tau| of every task."""
    used = jnp.arange(base.size) < count
    taus = [_taus(base, [expert])[0] for expert in experts]
    signs = [kernels.pack_bits((tau >= 0) & used) for tau in taus]
    return signs, [jnp.abs(tau) for tau in taus]


@functools.partial(jax.jit, static_argnames="dtype")
def _bitdelta_restore(base, packed, scale, dtype):
    positive = kernels.unpack_bits(packed, base.size)
    return (base.astype(jnp.float32) + jnp.where(positive, scale, -scale)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitDelta:
    """The signs of every task's change, and their mean magnitude; matrices only."""

    def parts(self, spec, dtypes):  # noqa: D102
        if len(spec.shape) < 2:
            return None
        num = kernels.num_bytes(spec.size)
        return {
            "signs": TensorSpec((len(dtypes), num), np.dtype(np.uint8)),
            "scales": TensorSpec((len(dtypes),), np.dtype(np.float32)),
        }

    def compress(self, base, experts, parts, put):  # noqa: D102
        size, tasks = base.spec.size, len(experts)
        row = kernels.num_bytes(size)
        absolute, total = np.zeros(tasks), np.zeros(tasks)
        for start, stop in blocks(size):
            length = _length(stop - start)
            chunk = [_padded(x.flat(start, stop), length) for x in (base, *experts)]
            count = np.int32(stop - start)
            signs, moved = jax.device_get(_bitdelta_chunk(chunk[0], chunk[1:], count))
            square = _squares(moved)
            check_finite(square, chunk)
            for t, bits in enumerate(signs):
                used = bits[: kernels.num_bytes(stop - start)]
                put("signs", t * row + start // 8, used)
            absolute += [
                each.reshape(-1, _ROW).sum(1).sum(dtype=float) for each in moved
            ]
            total += square
        scales = (absolute / size).astype(np.float32)
        put("scales", 0, scales)
        # sum (tau - s sign)^2, written out; rounding leaves relative errors of 1e-4 of
        # what is exact, far below those of real changes.
        wide = scales.astype(np.float64)
        return Errors(total - 2 * wide * absolute + size * wide**2, total)

    def restore(self, base, parts, task, dtype):  # noqa: D102
        size = base.spec.size
        row, scale = kernels.num_bytes(size), parts["scales"].flat(task, task + 1)[0]
        for start, stop in blocks(size):
            length, first = _length(stop - start), task * row + start // 8
            used = kernels.num_bytes(stop - start)
            values = _bitdelta_restore(
                _padded(base.flat(start, stop), length),
                _padded(parts["signs"].flat(first, first + used), length // 8),
                scale,
                dtype,
            )
            yield start, np.asarray(values)[: stop - start]
