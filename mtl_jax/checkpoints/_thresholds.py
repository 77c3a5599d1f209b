"""Exact k-th largest magnitudes of tensors that are read in chunks, without sorting.

A sample brackets the k-th largest value; one pass counts what lies above the bracket
and collects the few entries inside it; among those the value is found exactly. Entries
that equal it are kept in the order of their indices until there are k. Should the
sample mislead, a histogram of the upper bits gives a bracket that cannot.

Values are bit patterns of magnitudes, uint32 below 2^31. Zeros are never looked at: to
all callers a zero that is kept and one that is dropped are the same.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mtl_jax.checkpoints import _programs
from mtl_jax.checkpoints._stream import Chunk, Stream

ALL = 0xFFFFFFFF
_TOP = 1 << 31
_SAMPLES = 1 << 14
_MANY = 1 << 20
_SIGMAS = 4.5
_SHIFT = 15

Lanes = Callable[[Chunk], jax.Array]
Sampled = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class Cut:
    """The k largest of one tensor: above `bits`, or among the first equals of it.

    Attributes:
      bits: pattern of the smallest one kept, above all where none is.
      need: how many equals are kept; None for all of them.
      equals: how many there are, chunk by chunk.
    """

    bits: int
    need: int | None = None
    equals: Sequence[int] = ()

    def limit(self, number: int, row: Callable[[], np.ndarray]) -> int:
        """Index in a chunk before which equals are kept.

        Args:
          number: of the chunk.
          row: computes the values of the chunk.
        """
        if self.need is None:
            return ALL
        rest = self.need - sum(self.equals[:number])
        if rest <= 0:
            return 0
        if rest >= self.equals[number]:
            return ALL
        return int(np.flatnonzero(row() == np.uint32(self.bits))[rest - 1]) + 1


class Bracket(NamedTuple):
    """Values from `low` to below `high`, of which `value` is expected to be common."""

    low: int
    high: int
    value: int


class _Inside(NamedTuple):
    """Values of a chunk that lie in a bracket, and how many more equal `value`."""

    values: np.ndarray
    value: int
    count: int

    def equal(self, bits: int) -> int:
        found = int(np.count_nonzero(self.values == np.uint32(bits)))
        return found + (self.count if bits == self.value else 0)

    def larger(self, bits: int) -> int:
        found = int(np.count_nonzero(self.values > np.uint32(bits)))
        return found + (self.count if self.value > bits else 0)


@dataclasses.dataclass
class Tally:
    """What one pass over a tensor says about one bracket."""

    above: int = 0
    inside: list[_Inside] = dataclasses.field(default_factory=list)

    def add(self, row: np.ndarray, classes: np.ndarray, value: int) -> None:
        """Counts and collects a chunk, [n], by its classes."""
        self.above += int(np.count_nonzero(classes == 3))
        count = int(np.count_nonzero(classes == 2))
        values = row[np.flatnonzero(classes == 1)]
        self.inside.append(_Inside(values, value, count))


def brackets(sample: np.ndarray, total: int, wanted: Sequence[int]) -> list[Bracket]:
    """Where the k-th largest of `total` values very likely lies.

    Args:
      sample: uint32 [n].
      total: number of values sampled from.
      wanted: the k's.
    """
    sample = np.sort(sample)[::-1]
    found = []
    for k in wanted:
        share = k / max(total, 1)
        place = share * sample.size
        room = _SIGMAS * math.sqrt(max(sample.size * share * (1 - share), 0)) + 4
        first, last = math.floor(place - room), math.ceil(place + room)
        high = int(sample[first]) + 1 if 0 <= first < sample.size else _TOP
        low = int(sample[last]) if 0 <= last < sample.size else 1
        low = min(max(low, 1), high)
        inside = sample[(sample >= np.uint32(low)) & (sample < np.uint32(high))]
        values, counts = np.unique(inside, return_counts=True)
        value = int(values[np.argmax(counts)]) if values.size else low
        found.append(Bracket(low, high, min(max(value, low), high - 1)))
    return found


def sample_step(total: int) -> int:
    """Every how many entries of `total` to look at, to place brackets."""
    return max(1, total // min(_MANY, max(_SAMPLES, total >> 7)))


def tally(
    stream: Stream, lanes: Lanes, wanted: Sequence[Sequence[Bracket]]
) -> list[list[Tally]]:
    """One pass over a tensor, for all lanes and all brackets of each."""
    found = [[Tally() for _ in lane] for lane in wanted]
    bounds = np.array(wanted, np.uint32)
    for chunk in stream.chunks():
        values = lanes(chunk)
        classes = np.asarray(_programs.classify(values, bounds))
        rows = np.asarray(values)[:, : chunk.length]
        for i, row in enumerate(rows):
            for j, one in enumerate(found[i]):
                one.add(row, classes[i, j, : chunk.length], wanted[i][j].value)
    return found


def _kth(tallies: Sequence[Tally], k: int, bracket: Bracket) -> int | None:
    """The k-th largest value; None: it is not inside.

    Past the smallest value of a bracket that begins at 1 come zeros.
    """
    rest = k - sum(t.above for t in tallies)
    parts = [part for t in tallies for part in t.inside]
    values = np.concatenate([p.values for p in parts] or [np.zeros(0, np.uint32)])
    common = sum(p.count for p in parts)
    if rest <= 0:
        return None
    value = np.uint32(bracket.value)
    larger = values[values > value]
    if rest <= larger.size:
        # Sorting is vectorised and selecting is not: it is faster for so few.
        return int(np.sort(larger)[larger.size - rest])
    rest -= larger.size + common
    if rest <= 0:
        return bracket.value
    smaller = values[values < value]
    if rest <= smaller.size:
        return int(np.sort(smaller)[smaller.size - rest])
    return 0 if bracket.low <= 1 else None


def solve(tallies: Sequence[Tally], k: int, bracket: Bracket) -> list[Cut] | None:
    """The cut of each tensor that together keep the k largest; None: wrong bracket."""
    bits = _kth(tallies, k, bracket)
    if bits is None:
        return None
    if bits == 0:
        return [Cut(0) for _ in tallies]
    larger = sum(t.above + sum(p.larger(bits) for p in t.inside) for t in tallies)
    equals = [[part.equal(bits) for part in t.inside] for t in tallies]
    need, cuts = k - larger, []
    for one in equals:
        total = sum(one)
        cuts.append(Cut(bits, None if need >= total else max(need, 0), one))
        need -= total
    return cuts


def _coarse(
    streams: Sequence[Stream], lanes: Sequence[Lanes], lane: int, k: int
) -> Bracket:
    """A bracket that surely holds the k-th largest, by a histogram of upper bits."""
    counts = np.zeros(_TOP >> _SHIFT, np.int64)
    for stream, values in zip(streams, lanes, strict=True):
        for chunk in stream.chunks():
            row = np.asarray(values(chunk))[lane, : chunk.length]
            counts += np.bincount(row >> np.uint32(_SHIFT), minlength=counts.size)
    above = np.cumsum(counts[::-1])
    place = counts.size - 1 - int(np.searchsorted(above, k))
    low, high = max(place << _SHIFT, 1), (place + 1) << _SHIFT
    return Bracket(low, high, low)


def select(
    streams: Sequence[Stream],
    lanes: Sequence[Lanes],
    sampled: Sampled,
    wanted: Sequence[Sequence[int]],
    run: Callable[..., Sequence[list[list[Tally]]]] | None = None,
) -> list[list[list[Cut]]]:
    """Cuts that keep the k largest of tensors taken as one vector.

    Args:
      streams: the tensors.
      lanes: for each of them, the values of a chunk, uint32 [L, C] on the device; one
        lane per model or statistic.
      sampled: the same for float32 values [M, n] of a sample.
      wanted: per lane the k's, from 0 to the number of entries.
      run: maps a function over streams and lanes, in order.

    Returns:
      For each tensor, lane and k a `Cut`.
    """
    total = sum(stream.size for stream in streams)
    step = sample_step(total)
    sample = np.concatenate([sampled(s.sample(step)) for s in streams], axis=1)
    guess = [brackets(row, total, ks) for row, ks in zip(sample, wanted, strict=True)]
    mapped = run or map
    tallies = list(mapped(lambda s, v: tally(s, v, guess), streams, lanes))
    cuts: list[list[list[Cut]]] = [[[] for _ in wanted] for _ in streams]
    for i, ks in enumerate(wanted):
        for j, k in enumerate(ks):
            found = _one(streams, lanes, tallies, i, j, k, guess[i][j], total)
            for n, cut in enumerate(found):
                cuts[n][i].append(cut)
    return cuts


def _one(streams, lanes, tallies, i, j, k, bracket, total) -> list[Cut]:
    """The cuts of one lane and one k."""
    if k <= 0:
        return [Cut(ALL) for _ in streams]
    if k >= total:
        return [Cut(0) for _ in streams]
    found = solve([t[i][j] for t in tallies], k, bracket)
    if found is None:
        bracket = _coarse(streams, lanes, i, k)
        only = [[bracket]]
        again = [
            tally(stream, lambda c, v=values: v(c)[i : i + 1], only)[0][0]
            for stream, values in zip(streams, lanes, strict=True)
        ]
        found = solve(again, k, bracket) or []
    return found
