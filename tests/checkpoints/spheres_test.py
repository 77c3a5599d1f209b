import numpy as np
import pytest

from mtl_jax.checkpoints import engine
from mtl_jax.checkpoints.rules import Job
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

SIZE = 384


class Sink:
    """Keeps what it is given."""

    def __init__(self):
        self.done, self.out = frozenset(), np.full(SIZE, np.nan, np.float32)

    def write(self, name, start, values):
        del name
        self.out[start : start + values.size] = values


def merge(rule, base, experts, **options):
    job = Job(
        name="w",
        spec=TensorSpec((SIZE,), np.dtype(np.float32)),
        rule=rule,
        base=ArrayView(base),
        experts=tuple(map(ArrayView, experts)),
        options=options,
    )
    sink = Sink()
    engine.run([job], sink, chunk=256, threads=1)
    return sink.out


def multislerp(taus, weights):
    """Float64: the mean of directions, at the mean length; zero has no direction."""
    lengths = np.array([np.linalg.norm(t) for t in taus])
    units = [t / n if n else t for t, n in zip(taus, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    return mean / np.linalg.norm(mean) * (weights @ lengths)


@pytest.mark.parametrize("small", [0.0, 1e-4])
def test_multislerp_of_a_model_that_hardly_moved(small):
    """Its large factor, 1 over its length, does not cost the others their digits."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=SIZE).astype(np.float32)
    steps = 1.0, small, 1.0
    experts = [(base + s * rng.normal(size=SIZE)).astype(np.float32) for s in steps]
    found = merge("multislerp", base, experts, weight=1.0)
    wide = base.astype(np.float64)
    taus = [x.astype(np.float64) - wide for x in experts]
    wanted = wide + multislerp(taus, np.full(3, 1 / 3))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
