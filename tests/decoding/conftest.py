"""A small recurrent model that any decoding can run, and its naive twin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """h <- h / 2 + embed[token]; logits = h @ out. Traces are counted by name."""

    context: int | None = 40
    vocab_size: int | None = 7
    traces: list = dataclasses.field(default_factory=list, compare=False)

    def init_cache(self, params, batch, length):
        return {"h": jnp.zeros((batch, params["embed"].shape[1])), "size": length}

    def prefill(self, params, ids, lengths, cache):
        self.traces.append("prefill")

        def read(h, column):
            token, there = column
            new = h / 2 + params["embed"][token]
            return jnp.where(there[:, None], new, h), None

        there = jnp.arange(ids.shape[1])[None] < lengths[:, None]
        h, _ = jax.lax.scan(read, cache["h"], (ids.T, there.T))
        return h @ params["out"], {**cache, "h": h}

    def decode(self, params, token, cache):
        self.traces.append("decode")
        h = cache["h"] / 2 + params["embed"][token]
        return h @ params["out"], {**cache, "h": h}

    def reorder(self, cache, rows):
        return {**cache, "h": cache["h"][rows]}


def _naive(params, ids):
    """float64 logits after all of ids."""
    h = np.zeros(params["embed"].shape[1])
    for token in ids:
        h = h / 2 + np.asarray(params["embed"], np.float64)[token]
    return h @ np.asarray(params["out"], np.float64)


@pytest.fixture
def recurrent():
    return Recurrent


@pytest.fixture(scope="session")
def naive():
    """(params, ids) -> logits [V]."""
    return _naive


@pytest.fixture(scope="session")
def naive_logprobs():
    """(params, ids) -> log p [V]."""

    def run(params, ids):
        logits = _naive(params, ids)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    return run


@pytest.fixture(scope="session")
def weights():
    """(seed, vocabulary) -> parameters of `Recurrent`."""

    def make(seed=0, vocab=7, width=4):
        rng = np.random.default_rng(seed)
        return {
            "embed": jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32),
            "out": jnp.asarray(2 * rng.normal(size=(width, vocab)), jnp.float32),
        }

    return make
