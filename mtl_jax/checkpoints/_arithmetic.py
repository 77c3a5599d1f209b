"""Task arithmetic and its kin: trim each task vector, elect signs or not, add."""

import functools
from typing import Any

import jax
import numpy as np

from mtl_jax.checkpoints import _programs, _ranks, _thresholds
from mtl_jax.checkpoints._draws import Coin, Coins
from mtl_jax.checkpoints._stream import Chunk, Stream
from mtl_jax.checkpoints._thresholds import ALL, Cut
from mtl_jax.checkpoints._work import Work, floats, is_zero

_TINY = 1e-7  # Norms below it are not matched.


def magnitudes(chunk: Chunk) -> jax.Array:
    """uint32 [T, C], of the task vectors."""
    return _programs.magnitudes(chunk.data)


def sampled_magnitudes(values: np.ndarray) -> np.ndarray:
    """uint32 [T, n] of a sample [1 + T, n]."""
    deltas = np.ascontiguousarray(values[1:] - values[:1])
    return deltas.view(np.uint32) & np.uint32(0x7FFFFFFF)


class Everything:
    """Selects all entries."""

    kind, rows = "all", False

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """Nothing that a program would need."""
        del chunk
        return {}


class Band:
    """Selects what reaches one cutoff per task and does not reach another.

    Args:
      cuts: per task, one or two.
    """

    kind, rows = "band", False

    def __init__(self, cuts: list[list[Cut]]):
        self._cuts = [[*task, Cut(ALL)][:2] for task in cuts]

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """uint32 [4, T]: bits and limit, twice."""
        bits = functools.cache(lambda: np.asarray(magnitudes(chunk)))
        found = np.zeros((4, len(self._cuts)), np.uint32)
        for t, pair in enumerate(self._cuts):
            for i, cut in enumerate(pair):
                row = functools.partial(lambda t: bits()[t][: chunk.length], t)
                found[2 * i : 2 * i + 2, t] = cut.bits, cut.limit(chunk.number, row)
        return {"cuts": found}


def top_counts(options: dict[str, Any], sizes: list[int]) -> list[list[int]]:
    """Per task how many entries reach the lower cutoff, and the upper, if any.

    As in mergekit: of n entries int(density n) are kept, without a gamma at least one
    unless the density is 0; int(gamma n) at the top are dropped, or as many as leave
    that number.
    """
    found = []
    for t, size in enumerate(sizes):
        density = options["density"][t]
        kept = size if density >= 1 else int(density * size)
        if "gamma" not in options:
            found.append([max(kept, min(size, 1)) if density > 0 else 0])
            continue
        top = 0 if density >= 1 else int(options["gamma"][t] * size)
        bottom = max(size - kept - top, 0)
        top = size - kept - bottom
        found.append([size - bottom, top])
    return found


def cuts_together(works: list[Work], run: Any) -> list[list[list[Cut]]]:
    """Cutoffs of several tensors, which compete as one vector per task.

    Raises:
      ValueError: their densities differ.
    """
    first, size = works[0], sum(work.stream.size for work in works)
    for work in works:
        if work.options["density"] != first.options["density"]:
            raise ValueError(
                f"{work.job.rule}: {work.job.name!r}: option 'density' is "
                f"{work.options['density']}, but {first.options['density']} for "
                f"{first.job.name!r}; the scope is the model, wanted one for all"
            )
    streams: list[Stream] = [work.stream for work in works]
    return _thresholds.select(
        streams,
        [magnitudes] * len(streams),
        sampled_magnitudes,
        top_counts(first.options, [size] * first.count),
        run,
    )


def _selection(work: Work) -> Any:
    """How a job selects entries."""
    options, name = work.options, work.job.rule
    if min(options.get("density", (1.0,))) >= 1:
        return Everything()
    if name.startswith("dare"):
        return Coins(work) if rescale_of(options) == "l1" else Coin(work)
    if name.startswith("della"):
        if rescale_of(options) == "probability":
            return _ranks.Chances(work)
        return _ranks.Ranks(work)
    if work.given is not None:
        return Band(work.given)
    wanted = top_counts(options, [work.stream.size] * work.count)
    cuts = _thresholds.select([work.stream], [magnitudes], sampled_magnitudes, wanted)
    return Band(cuts[0])


def rescale_of(options: Any) -> str:
    """The norm that is restored, by the names of which booleans are short forms."""
    value = options["rescale"]
    if isinstance(value, bool):
        return "l1" if value else "none"
    return value


def _factors(work: Work, selection: Any) -> np.ndarray:
    """What the selected entries of each task are multiplied by."""
    mode = rescale_of(work.options)
    ones = np.ones(work.count)
    if mode == "none" or selection.kind in ("all", "chance"):
        return ones
    if mode == "probability":
        density = work.weights("density")
        return 1 / np.where(density > 0, density, 1)

    def norms(chunk):
        args = selection.args(chunk)
        return _programs.norms(chunk.data, args, select=selection.kind)

    before, after = work.total(norms, rows=selection.rows).T
    usable = (before >= _TINY) & (after >= _TINY)
    return np.where(usable, before / np.where(usable, after, 1), 1)


def arithmetic(work: Work) -> None:
    """Base + lambda * sum_t w_t kept_t, divided by the weights where asked for."""
    options = work.options
    if not work.stream.size:
        return
    selection = _selection(work)
    weights, scale = work.weights(), float(options["lambda"])
    elect = work.job.rule in ("ties", "dare_ties", "breadcrumbs_ties", "della")
    if options["normalize"] and not elect:
        total = weights.sum()
        scale /= 1.0 if is_zero(total) else total
    both = floats(np.stack([weights * _factors(work, selection), weights]))

    def merge(chunk):
        return _programs.arithmetic(
            chunk.data,
            both,
            floats(scale),
            selection.args(chunk),
            select=selection.kind,
            elect=elect,
            normalize=elect and options["normalize"],
            dtype=work.dtype,
        )

    work.emit(merge, rows=selection.rows)
