"""Memory does not grow with the tensor."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import engine, rules
from mtl_jax.checkpoints.source import TensorSpec

BF16 = np.dtype(ml_dtypes.bfloat16)
SIZE = 40_000_000  # 400 MB of all models.
STATUS = pathlib.Path("/proc/self/status")


def anonymous():
    """Bytes of this process that no file backs."""
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))


class Cyclic:
    """A tensor that repeats a pattern and is nowhere as a whole."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self._pattern = rng.normal(size=(1 << 18) + 999).astype(np.float32).astype(BF16)
        self.spec = TensorSpec((SIZE // 1000, 1000), BF16)

    def flat(self, start, stop):
        return np.resize(np.roll(self._pattern, -start), stop - start)

    def whole(self):
        raise AssertionError("read as a whole")


class Sink:
    done = ()

    def __init__(self):
        self.peak, self.written = 0, 0

    def write(self, name, start, values):
        self.written += values.size
        if start % (1 << 21) < values.size:
            self.peak = max(self.peak, anonymous())


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("ties", {"weight": 1.0, "density": 0.5}),
        ("della", {"weight": 1.0, "density": 0.5}),
    ],
)
def test_stays_below_half_of_what_is_read(rule, options):
    """And far below the task vectors in float32."""
    views = [Cyclic(seed) for seed in range(5)]
    job = rules.Job(
        name="w",
        spec=views[0].spec,
        rule=rule,
        base=views[0],
        experts=tuple(views[1:]),
        options=options,
    )
    before, sink = anonymous(), Sink()
    summary = engine.run([job], sink, threads=1)
    assert sink.written == SIZE
    assert sink.peak - before < summary.bytes_read / 2
