import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.train import fingerprint
from mtl_jax.train.state import init_state

pytestmark = pytest.mark.fast


def describe(toy, **changes):
    trainable = toy.trainable(**changes)
    state = jax.eval_shape(
        lambda k: init_state(trainable, toy.init(k), k), jax.random.key(0)
    )
    return fingerprint.describe_run(
        state, seed=0, accumulate=1, ema=None, identity=None
    )


def test_equal_runs_are_equal_and_plain(toy):
    one, two = describe(toy), describe(toy)
    assert json.loads(json.dumps(one)) == two
    assert fingerprint.differences(one, two) == []
    assert one["frozen"] == ["scale"]


@pytest.mark.parametrize("other", ["adam", "sgd", "lion", "adafactor"])
def test_chains_are_told_apart(toy, other):
    found = fingerprint.differences(
        describe(toy), describe(toy, tx=getattr(optax, other)(1e-2))
    )
    assert found and all(phrase.startswith("optimizer.") for phrase in found)


def test_masked_leaves_do_not_count(toy):
    def masked(mask):
        return optax.masked(optax.adam(1e-2), lambda p: {**mask, "scale": None})

    mask = {"body": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    names = describe(toy, tx=masked(mask))["optimizer"]
    assert names == ["MaskedState", "ScaleByAdamState", "EmptyState"]


def test_long_lists_of_differences_are_cut():
    saved, found = {"tasks": list("abcdefg")}, {"tasks": list("bcdefgh")}
    assert len(fingerprint.differences(saved, found)) == 7
    with pytest.raises(ValueError, match="fit: w holds .*tasks.4.*; and 2 more$"):
        fingerprint.refuse("w", saved, found)
    fingerprint.refuse("w", saved, saved)


def test_batches_are_described_by_leaf():
    batch = {"x": np.zeros((8, 4), np.float32), "n": (jnp.zeros((), jnp.int32),)}
    assert fingerprint.describe_batch(batch) == {
        "n/0": "int32[]",
        "x": "float32[8, 4]",
    }
