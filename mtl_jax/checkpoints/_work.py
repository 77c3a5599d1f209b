"""What a rule works with: the chunks of a tensor, its options, and where results go."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mtl_jax.checkpoints import _stream
from mtl_jax.checkpoints._stream import Buffers, Chunk, Stream
from mtl_jax.checkpoints.rules import Job, resolve

_FLOATS = {
    np.dtype(d)
    for d in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
} | {np.dtype(ml_dtypes.float8_e5m2)}
_FLOAT32 = np.dtype(np.float32)


class Work:
    """One job being done.

    Attributes:
      job: what is to be done.
      options: of the job, resolved.
      stream: chunks of its tensors.
      count: number of experts.
      seed: of rules that draw.
      given: what was found out before for several tensors together.
    """

    def __init__(
        self,
        job: Job,
        writer: Any,
        buffers: Buffers,
        *,
        chunk: int,
        seed: int,
        check_finite: bool,
        given: Any = None,
    ):
        self.job, self.seed, self.given = job, seed, given
        self.options = resolve(job)
        self.stream = Stream(job, buffers, chunk, check_finite)
        self.count = len(job.experts)
        self.buffers = buffers
        self._writer, self._check = writer, check_finite
        self._stored = np.dtype(job.spec.dtype)
        # What programs return; others are cast on the host.
        self.dtype = self._stored if self._stored in _FLOATS else _FLOAT32

    def write(self, start: int, values: np.ndarray) -> None:
        """Hands entries from `start` on to the writer, cast if need be.

        Raises:
          ValueError: the result has left the range of the dtype.
        """
        values = np.asarray(values)
        if values.dtype != self._stored:
            values = values.astype(self._stored)
        if self._check and not _stream.finite(values):
            raise ValueError(
                f"{self.job.rule}: {self.job.name!r}: the result is not finite in "
                f"{self._stored}; options {dict(self.options)}"
            )
        self._writer.write(self.job.name, start, values)

    def emit(self, function: Callable[[Chunk], Any], *, rows: bool = False) -> None:
        """Writes the result of every chunk."""
        for chunk in self.stream.chunks(rows=rows):
            out = np.asarray(function(chunk))
            self.write(chunk.start, out[: chunk.length])

    def total(
        self, function: Callable[[Chunk], Any], *, rows: bool = False
    ) -> np.ndarray:
        """Sums of lanes, the last axis of what a program returns, over all chunks."""
        found: Any = 0.0
        for chunk in self.stream.chunks(rows=rows):
            found = found + np.sum(np.asarray(function(chunk)), -1, dtype=np.float64)
        return found

    def keys(self) -> np.ndarray:
        """uint32 [T, 2], of the seed, the name of the tensor, the model's place."""
        return np.stack([self._key(t) for t in range(self.count)])

    def _key(self, task: int) -> np.ndarray:
        text = f"{self.seed}\0{task}\0{self.job.name}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return np.frombuffer(digest, "<u4").astype(np.uint32)

    def weights(self, name: str = "weight") -> np.ndarray:
        """A per-model option, float64 [T]."""
        return np.asarray(self.options[name], np.float64)

    def whole(self, index: int) -> np.ndarray:
        """All of one view in float32, checked."""
        view = self.job.views[index]
        values = np.asarray(view.whole())
        if self._check and not _stream.finite(values):
            raise ValueError(
                f"{self.job.rule}: {self.job.name!r}: NaN or infinity in "
                f"{self.job.model(index)}"
            )
        return values.astype(np.float32)


def halves(index: int) -> np.ndarray:
    """uint32 [2], low and high half."""
    return np.array([index & 0xFFFFFFFF, index >> 32], np.uint32)


def floats(*values: Any) -> np.ndarray:
    """float32."""
    array = np.asarray(values if len(values) > 1 else values[0], np.float64)
    return array.astype(np.float32)


def is_zero(value: float) -> bool:
    """Whether a sum of weights is one to divide by."""
    return math.isclose(value, 0, abs_tol=1e-8)
