"""Rules that look at one entry at a time, or at simple counts of a tensor."""

from typing import Any

import jax
import numpy as np

from mtl_jax.checkpoints import _programs, _thresholds
from mtl_jax.checkpoints._stream import Chunk
from mtl_jax.checkpoints._thresholds import Cut
from mtl_jax.checkpoints._work import Work, floats


def passthrough(work: Work) -> None:
    """The model itself; without a number to multiply by, not even computed with."""
    (scale,) = work.options["scale"]
    if scale is None:
        for chunk in work.stream.chunks():
            stop = chunk.start + chunk.length
            work.write(chunk.start, work.job.experts[0].flat(chunk.start, stop))
    else:
        factor = floats([scale])
        work.emit(lambda c: _programs.combine(c.data, factor, dtype=work.dtype))


def copied(work: Work) -> None:
    """What holds no numbers to merge, and must be equal in all models.

    Raises:
      ValueError: it is not.
    """
    job, step = work.job, work.stream.bounds()[0]
    for start in range(0, job.size, step):
        stop = min(start + step, job.size)
        first = np.asarray(job.views[0].flat(start, stop))
        for index, view in enumerate(job.views):
            if not np.array_equal(first, view.flat(start, stop)):
                raise ValueError(
                    f"{job.rule}: {job.name!r} is {first.dtype} and differs between "
                    f"{job.model(0)} and {job.model(index)}; only floating point is "
                    "merged"
                )
        work.write(start, first)


def magmax(work: Work) -> None:
    """The largest change of every entry."""
    weights, scale = floats(work.weights()), floats(work.options["lambda"])
    work.emit(lambda c: _programs.magmax(c.data, weights, scale, dtype=work.dtype))


def nearswap(work: Work) -> None:
    """The other model, no farther than t."""
    bound = floats(work.options["t"])
    work.emit(lambda c: _programs.nearswap(c.data, bound, dtype=work.dtype))


def ram(work: Work) -> None:
    """The mean over the models that changed an entry; RAM+ boosts the single ones."""
    options, epsilon = work.options, floats(work.options["epsilon"])
    boost = np.ones(work.count)
    if work.job.rule == "ramplus_tl":
        counts = work.total(lambda c: _programs.overlaps(c.data, epsilon))
        shared, unique = np.reshape(counts, (-1, 2)).T if np.ndim(counts) else (0, 1)
        ratio = shared / np.maximum(unique, max(float(options["epsilon"]), 1e-300))
        boost = boost + options["r"] * np.clip(ratio, 0, options["alpha"])
    factors = floats(boost)
    work.emit(lambda c: _programs.ram(c.data, factors, epsilon, dtype=work.dtype))


def _variances(chunk: Chunk) -> jax.Array:
    return _programs.variances(chunk.data)


def _row(chunk: Chunk) -> np.ndarray:
    return np.asarray(_variances(chunk))[0, : chunk.length]


def _sampled_variances(values: np.ndarray) -> np.ndarray:
    spread = np.var(values[1:] - values[:1], axis=0, dtype=np.float32)[None]
    return np.ascontiguousarray(spread).view(np.uint32)


def _most_varied(work: Work) -> Cut | None:
    """Where the models differ most; None for everywhere."""
    share = float(work.options["select_topk"])
    if share >= 1:
        return None
    nonzero = 0
    for chunk in work.stream.chunks():
        nonzero += int(np.count_nonzero(_row(chunk)))
    wanted = [[int(nonzero * share)]]
    cuts = _thresholds.select([work.stream], [_variances], _sampled_variances, wanted)
    return cuts[0][0][0]


def sce(work: Work) -> None:
    """Selects by variance, weighs by energy, erases the minority sign."""
    if not work.stream.size:
        return
    cut = _most_varied(work)

    def bounds(chunk: Chunk) -> Any:
        if cut is None:
            return None
        limit = cut.limit(chunk.number, lambda: _row(chunk))
        return np.array([cut.bits, limit], np.uint32)

    squares = work.total(lambda c: _programs.squares(c.data, bounds(c)))
    means = squares / work.stream.size
    level = means.sum() < 1e-6
    shares = np.full(work.count, 1 / work.count) if level else means / means.sum()
    weights = floats(shares * work.weights())
    work.emit(lambda c: _programs.sce(c.data, weights, bounds(c), dtype=work.dtype))
