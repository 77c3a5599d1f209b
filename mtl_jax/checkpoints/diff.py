"""What two checkpoints have in common, tensor by tensor, without loading either."""

import concurrent.futures
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mtl_jax.checkpoints.source import TensorView


__all__ = ["Comparison", "Diff", "TensorDiff", "compare", "diff"]

_READ = 1 << 20  # Entries read at a time.
_BLOCK = 1 << 13  # Entries whose float64 copies stay in the cache and the heap.

Checkpoint = Mapping[str, "TensorView"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sums over pairs of entries; those of two tensors add up to those of both.

    Everything but the counts of NaN and infinity is over the entries that are finite in
    both. x and y are the entries compared by direction: the weights, or with a base
    the changes from it.

    Attributes:
      size: entries.
      aa: sum of a^2.
      bb: sum of b^2.
      dd: sum of (b - a)^2.
      xx: sum of x^2.
      yy: sum of y^2.
      xy: sum of x y.
      same: entries where x and y have one sign.
      opposite: entries where they have opposite signs.
      changed: entries where a and b are not equal.
      largest: of |b - a|.
      nan_a: NaN in a.
      nan_b: NaN in b.
      inf_a: infinities in a.
      inf_b: infinities in b.
    """

    size: int = 0
    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    same: int = 0
    opposite: int = 0
    changed: int = 0
    largest: float = 0.0
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0

    def __add__(self, other: "Comparison") -> "Comparison":
        """The comparison of both pairs of tensors as one pair."""
        names = [field.name for field in dataclasses.fields(self)]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Comparison(**{**sums, "largest": max(self.largest, other.largest)})

    @property
    def relative(self) -> float:
        """|b - a| / |a|; 0 between zeros, infinite where only a is zero."""
        if not self.dd:
            return 0.0
        return math.sqrt(self.dd / self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float | None:
        """Between x and y; None where one of them is zero."""
        if not self.xx or not self.yy:
            return None
        cosine = self.xy / (math.sqrt(self.xx) * math.sqrt(self.yy))
        return min(max(cosine, -1.0), 1.0)

    @property
    def signs(self) -> float | None:
        """Share of one sign, of the entries where neither is 0; None without any."""
        both = self.same + self.opposite
        return self.same / both if both else None

    @property
    def share_changed(self) -> float | None:
        """Share of entries that are not equal; None for an empty tensor."""
        return self.changed / self.size if self.size else None

    @property
    def broken_a(self) -> int:
        """NaN and infinities in a."""
        return self.nan_a + self.inf_a

    @property
    def broken_b(self) -> int:
        """NaN and infinities in b."""
        return self.nan_b + self.inf_b


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """The comparison of one tensor.

    Attributes:
      name: of the tensor.
      shape: in both.
      dtypes: in a and in b.
      sums: the comparison.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    sums: Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """What `diff` found.

    Attributes:
      tensors: the tensors of one shape in both, in the order of a.
      only_a: names that b lacks.
      only_b: names that a lacks.
      reshaped: name -> shapes in a and b, where they differ.
      no_base: names that the base lacks, or has in another shape: in their
        comparison, x and y are the weights and no changes, so they count for nothing
        that is summed by direction in `total` and `groups`.
      with_base: whether x and y are changes from a base.
    """

    tensors: tuple[TensorDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    no_base: tuple[str, ...] = ()
    with_base: bool = False

    @property
    def total(self) -> Comparison:
        """All compared tensors as one."""
        return self.groups(lambda _: "").get("", Comparison())

    def groups(self, key: Callable[[str], Any]) -> dict[Any, Comparison]:
        """Comparisons of the tensors that a function of their names puts together.

        Args:
          key: name -> group; None leaves a tensor out.

        Returns:
          Group -> comparison, in the order in which the groups appear.
        """
        found: dict[Any, Comparison] = {}
        for each in self.tensors:
            if (group := key(each.name)) is None:
                continue
            sums = each.sums
            if each.name in self.no_base:
                sums = dataclasses.replace(sums, xx=0.0, yy=0.0, xy=0.0)
                sums = dataclasses.replace(sums, same=0, opposite=0)
            found[group] = found.get(group, Comparison()) + sums
        return found


def compare(
    a: "TensorView", b: "TensorView", base: "TensorView | None" = None
) -> Comparison:
    """Compares two tensors of one shape, in float64 and a bounded amount of memory.

    Args:
      a: a tensor that is not read yet.
      b: another of its shape.
      base: a third; the directions compared are then a - base and b - base.

    Returns:
      `Comparison`; a complex tensor counts as its real and imaginary parts.
    """
    views = (a, b) if base is None else (a, b, base)
    size = a.spec.size
    total = Comparison()
    for start in range(0, size, _READ):
        parts = [view.flat(start, min(start + _READ, size)) for view in views]
        for begin in range(0, len(parts[0]), _BLOCK):
            block = [_wide(part[begin : begin + _BLOCK]) for part in parts]
            total = total + _compare_block(*block)
    return total


def _wide(values: np.ndarray) -> np.ndarray:
    """Any numbers as float64."""
    if np.issubdtype(values.dtype, np.complexfloating):
        values = np.ascontiguousarray(values).view(np.real(values).dtype)
    return values.astype(np.float64)


def _compare_block(
    a: np.ndarray, b: np.ndarray, base: np.ndarray | None = None
) -> Comparison:
    parts = [a, b] if base is None else [a, b, base]
    counts = {}
    if not all(np.isfinite(part).all() for part in parts):
        for key, part in (("a", a), ("b", b)):
            counts[f"nan_{key}"] = int(np.count_nonzero(np.isnan(part)))
            counts[f"inf_{key}"] = int(np.count_nonzero(np.isinf(part)))
        counts["changed"] = _unequal(a, b)
        keep = np.logical_and.reduce([np.isfinite(part) for part in parts])
        parts = [np.where(keep, part, 0.0) for part in parts]
    a, b = parts[:2]
    step = b - a
    x, y = (a, b) if base is None else (a - parts[2], b - parts[2])
    product = x * y
    counts.setdefault("changed", int(np.count_nonzero(step)))
    return Comparison(
        size=a.size,
        aa=float(a @ a),
        bb=float(b @ b),
        dd=float(step @ step),
        xx=float(x @ x),
        yy=float(y @ y),
        xy=float(product.sum()),
        same=int(np.count_nonzero(product > 0)),
        opposite=int(np.count_nonzero(product < 0)),
        largest=float(np.abs(step).max(initial=0.0)),
        **counts,
    )


def _unequal(a: np.ndarray, b: np.ndarray) -> int:
    """Entries that differ; NaN equals NaN."""
    return int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))


def diff(
    a: Checkpoint,
    b: Checkpoint,
    base: Checkpoint | None = None,
    *,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diff:
    """Compares two checkpoints, reading both once and holding neither.

    Args:
      a: name -> tensor that is not read yet, as of `open_source`.
      b: another.
      base: what both were fine-tuned from: cosines and signs are then of the changes.
      pattern: regular expression; only names in which it is found are compared.
      progress: called as `progress(tensors done, of how many)`.

    Returns:
      `Diff`. Tensors that only one has, or that have another shape, are listed there.

    Raises:
      ValueError: no regular expression, or one that matches nothing.
    """
    names_a, names_b = _chosen((a, b), pattern)
    shapes = {
        name: (tuple(a[name].spec.shape), tuple(b[name].spec.shape))
        for name in names_a
        if name in b
    }
    reshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    names = [name for name in shapes if name not in reshaped]
    bases = {
        name: base[name]
        for name in names
        if base is not None
        and name in base
        and tuple(base[name].spec.shape) == shapes[name][0]
    }

    def one(name: str) -> TensorDiff:
        return TensorDiff(
            name=name,
            shape=shapes[name][0],
            dtypes=(str(a[name].spec.dtype), str(b[name].spec.dtype)),
            sums=compare(a[name], b[name], bases.get(name)),
        )

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        tensors = tuple(_counted(pool.map(one, names), len(names), progress))
    return Diff(
        tensors=tensors,
        only_a=tuple(name for name in names_a if name not in b),
        only_b=tuple(name for name in names_b if name not in a),
        reshaped=reshaped,
        no_base=tuple(n for n in names if n not in bases) if base is not None else (),
        with_base=base is not None,
    )


def _chosen(checkpoints: Sequence[Checkpoint], pattern: str | None) -> list[list[str]]:
    """Names of each checkpoint that the pattern finds."""
    if pattern is None:
        return [list(each) for each in checkpoints]
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"diff: {pattern!r} is no regular expression: {error}"
        ) from error
    found = [[name for name in each if wanted.search(name)] for each in checkpoints]
    if not any(found):
        shown = ", ".join(list(checkpoints[0])[:4])
        raise ValueError(f"diff: {pattern!r} matches no tensor; there are {shown}")
    return found


def _counted(
    found: Iterable[TensorDiff], total: int, progress: Callable[[int, int], None] | None
) -> Iterable[TensorDiff]:
    for number, each in enumerate(found, 1):
        if progress is not None:
            progress(number, total)
        yield each
