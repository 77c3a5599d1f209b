"""Merges checkpoints tensor by tensor, chunk by chunk, in bounded memory.

Tensors are spread over a few threads; each reads the chunks of its tensor, of all
models, into one buffer, runs a compiled pass over it, and hands the result to the
writer. Rules with statistics read their tensor several times rather than keep it. What
a tensor becomes does not depend on the number of threads, nor on other tensors.
"""

import collections
import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mtl_jax.checkpoints import (
    _arithmetic,
    _elementwise,
    _memory,
    _spheres,
    _whole,
)
from mtl_jax.checkpoints._stream import Buffers
from mtl_jax.checkpoints._work import Work
from mtl_jax.checkpoints.rules import RULES, Job, check, is_copied, resolve

__all__ = ["Summary", "run"]

CHUNK = 1 << 18

_HANDLERS: Mapping[str, Callable[[Work], None]] = {
    "linear": _spheres.linear,
    "slerp": _spheres.slerp,
    "nuslerp": _spheres.nuslerp,
    "multislerp": _spheres.multislerp,
    "karcher": _spheres.karcher,
    "model_stock": _spheres.model_stock,
    "passthrough": _elementwise.passthrough,
    "nearswap": _elementwise.nearswap,
    "ram": _elementwise.ram,
    "ramplus_tl": _elementwise.ram,
    "sce": _elementwise.sce,
    "magmax": _elementwise.magmax,
    **dict.fromkeys(
        (
            "task_arithmetic",
            "ties",
            "breadcrumbs",
            "breadcrumbs_ties",
            "dare_linear",
            "dare_ties",
            "della",
            "della_linear",
        ),
        _arithmetic.arithmetic,
    ),
    **dict.fromkeys(
        (name for name, rule in RULES.items() if rule.whole), _whole.merging_rule
    ),
}


class Writer(Protocol):
    """Where results go; called from several threads."""

    @property
    def done(self) -> Iterable[str]:
        """Tensors that are written already."""
        ...

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Takes entries of a tensor from `start` on; the array is not changed later."""
        ...


class Summary(NamedTuple):
    """What a run did.

    Attributes:
      bytes_read: size of the tensors that were read, each counted once.
      bytes_written: size of the tensors that were written.
      seconds: from start to end.
      counts: how many tensors each rule made; "copied" for those without numbers.
    """

    bytes_read: int
    bytes_written: int
    seconds: float
    counts: Mapping[str, int]


class _Run:
    """The state that threads share."""

    def __init__(self, writer, seed, chunk, check_finite, progress, total):
        self._writer, self._seed, self._chunk = writer, seed, chunk
        self._check, self._progress, self._total = check_finite, progress, total
        self._buffers = Buffers()
        self._lock, self._large = threading.Lock(), threading.Lock()
        self._stopped, self._done = threading.Event(), 0
        self._device = jax.local_devices(backend="cpu")[0]
        self.given: dict[str, Any] = {}

    def work(self, job: Job) -> Work:
        """What a job works with."""
        return Work(
            job,
            self._writer,
            self._buffers,
            chunk=self._chunk,
            seed=self._seed,
            check_finite=self._check,
            given=self.given.get(job.name),
        )

    def __call__(self, job: Job) -> None:
        """Does a job, unless another one failed."""
        if self._stopped.is_set():
            return
        try:
            with jax.default_device(self._device):
                self._do(job)
        except BaseException:
            self._stopped.set()
            raise
        with self._lock:
            self._done += _nbytes(job.size, job.spec.dtype)
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _do(self, job: Job) -> None:
        work = self.work(job)
        if is_copied(job) and job.rule != "passthrough":
            _elementwise.copied(work)
        elif RULES[job.rule].whole:
            with self._large:  # One whole tensor at a time.
                _HANDLERS[job.rule](work)
        else:
            _HANDLERS[job.rule](work)

    def prepare(self, jobs: Sequence[Job], run: Any) -> None:
        """Finds what jobs have in common whose scope is the model."""
        groups = collections.defaultdict(list)
        # By name, so that equals are kept the same way in whatever order jobs come.
        for job in sorted(jobs, key=lambda job: job.name):
            if job.size and not is_copied(job):
                options = resolve(job)
                if options.get("scope") == "model" and min(options["density"]) < 1:
                    groups[job.rule].append(job)
        for group in groups.values():
            works = [self.work(job) for job in group]
            cuts = _arithmetic.cuts_together(works, run)
            names = [job.name for job in group]
            self.given |= dict(zip(names, cuts, strict=True))


def _nbytes(size: int, dtype: Any) -> int:
    return size * np.dtype(dtype).itemsize


def run(
    jobs: Sequence[Job],
    writer: Writer,
    *,
    seed: int = 0,
    chunk: int = CHUNK,
    check_finite: bool = True,
    progress: Callable[[int, int], Any] | None = None,
    threads: int | None = None,
) -> Summary:
    """Does all jobs that the writer has not done.

    Args:
      jobs: one per tensor, names distinct.
      writer: takes the results.
      seed: of rules that draw. What they draw for an entry depends on the seed, the
        name of the tensor, the place of the model among the experts and the index of
        the entry, on nothing else.
      chunk: entries of a tensor that are worked on at a time.
      check_finite: refuse NaN and infinity, in the inputs and in the results.
      progress: called with the bytes written and those to write, after each tensor.
      threads: how many tensors are worked on at a time; by default the number of
        cores, at most 4.

    Returns:
      A `Summary`.

    Raises:
      ValueError: a job that does not fit its rule, before anything is read; or values
        that are not finite, naming tensor and model.
    """
    began = time.perf_counter()
    _memory.keep_freed_memory()
    names = collections.Counter(job.name for job in jobs)
    for job in jobs:
        check(job)
        if names[job.name] > 1:
            raise ValueError(f"run: there are {names[job.name]} jobs for {job.name!r}")
    done = frozenset(writer.done)
    # The largest first, so that threads end together.
    left = sorted((j for j in jobs if j.name not in done), key=lambda j: -j.size)
    total = sum(_nbytes(j.size, j.spec.dtype) for j in left)
    state = _Run(writer, seed, chunk, check_finite, progress, total)
    threads = threads or min(os.cpu_count() or 1, 4)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # Also what is done counts for what is common.
        state.prepare(jobs if left else [], pool.map)
        futures = [pool.submit(state, job) for job in left]
        for future in concurrent.futures.as_completed(futures):
            future.result()
    counts = collections.Counter(
        "copied" if is_copied(j) and j.rule != "passthrough" else j.rule for j in left
    )
    return Summary(
        sum(_nbytes(j.size, v.spec.dtype) for j in left for v in j.views),
        total,
        time.perf_counter() - began,
        dict(counts),
    )
