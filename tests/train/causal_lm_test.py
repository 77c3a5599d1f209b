import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mtl_jax import models, train
from mtl_jax.data.packing import Packed
from mtl_jax.train import causal_lm
from mtl_jax.transforms.quantization import nf4

ROW = 12
MODULE = models.Decoder(
    vocab_size=11,
    width=8,
    depth=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=12,
    max_positions=ROW,
    scan=True,
)
LORA = causal_lm.LoraSettings(rules=(r"layers.*kernel$",), rank=2, alpha=4.0)


def params():
    like = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape) + 0.1, x.dtype),
        like["params"],
    )


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": rng.integers(0, 11, n),
            "weights": rng.integers(0, 3, n).astype(np.float32),
        }
        for n in lengths
    ]


def batch(docs, rows=3, **options):
    """Packed rows, filled up with empty ones to one shape."""
    packed = Packed(docs, ROW, **options)
    found = [packed[i] for i in range(len(packed))]
    empty = {k: np.zeros_like(v) for k, v in found[0].items()}
    found += [empty] * (rows - len(found))
    return {k: np.stack([row[k] for row in found]) for k in empty}


@pytest.fixture(scope="module")
def losses():
    run = jax.jit(causal_lm.token_losses(MODULE, chunk=5))
    own = params()
    return lambda rows: [np.asarray(x, np.float64) for x in run(own, rows)]


@settings(max_examples=8)
@given(st.lists(st.integers(1, ROW), min_size=2, max_size=3), st.integers(0, 5))
def test_packed_documents_do_not_see_each_other(losses, lengths, seed):
    """Losses of packed rows are those of rows with one document each.

    Kills attention or labels across segments, and positions that run on.
    """
    docs = documents(lengths, seed)
    together, apart = (
        losses(batch(docs, method="next_fit", max_segments=n)) for n in (None, 1)
    )

    def spent(found):
        return [x[found[1] > 0] for x in found]

    # Both keep the order of the documents.
    for x, y in zip(spent(together), spent(apart), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_losses_by_hand(losses):
    docs = documents([5, 4, 7])
    rows = batch(docs, method="next_fit")
    found, weights = losses(rows)
    logits = np.asarray(
        MODULE.apply({"params": params()}, rows["input_ids"], rows["segment_ids"]),
        np.float64,
    )
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.zeros(found.shape)
    for b, i in np.ndindex(found.shape):
        segments = rows["segment_ids"][b, i : i + 2]
        if len(segments) == 2 and segments[0] == segments[1] != 0:
            weight = rows["weights"][b, i + 1]
            want[b, i] = -logits[b, i, rows["input_ids"][b, i + 1]] * weight
            assert weights[b, i] == weight
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_tokens_or_segments_count_alike(losses):
    docs = documents([5, 4, 7])
    rows = batch(docs, method="next_fit")
    found, weights = losses(rows)
    means = []
    for b in range(len(found)):
        for n in range(1, rows["segment_ids"][b].max() + 1):
            place = rows["segment_ids"][b] == n
            if weights[b][place].sum():
                means.append(found[b][place].sum() / weights[b][place].sum())
    want = {"token": found.sum() / weights.sum(), "segment": np.mean(means)}
    for per, most in (("token", None), ("segment", 2)):
        built = causal_lm.causal_lm(
            MODULE, params(), tx=optax.sgd(0.1), per=per, max_segments=most
        )
        loss, metrics = jax.jit(built.loss_fn)(params(), rows, jax.random.key(0))
        assert float(loss) == pytest.approx(want[per], rel=1e-5)
        assert float(metrics["token_loss"]) == pytest.approx(want["token"], rel=1e-5)
        assert float(metrics["tokens"]) == weights.sum()


@pytest.mark.parametrize(
    ("mode", "codes"), [("merge", False), ("intercept", False), ("intercept", True)]
)
def test_only_the_adapter_learns(mode, codes):
    lora = dataclasses.replace(LORA, mode=mode)
    base = params()
    if codes:
        base = nf4.quantize(base, r"layers.*kernel$", block=4)
    trainable = causal_lm.causal_lm(MODULE, base, tx=optax.adam(0.03), lora=lora)
    rows = batch(documents([5, 4, 7]))
    trainer = train.Trainer(
        trainable, mesh=train.make_mesh(data=1, devices=jax.devices()[:1])
    )
    start = lora.start(jax.random.key(0), base)
    done = trainer.fit(lambda step: rows, steps=8, params=start, log_every=1)
    losses = [record["loss"] for record in done.history]
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, done.params["base"], base)
    moved = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max()), done.params["lora"], start["lora"]
    )
    assert min(jax.tree.leaves(moved)) > 0
    # What is merged for good gives the last loss again, but for one step.
    whole = lora.merge(done.params)
    found, weights = causal_lm.token_losses(MODULE)(whole, rows)
    assert float(found.sum() / weights.sum()) < losses[0] - 0.1


def test_options():
    with pytest.raises(ValueError, match="per is 'word'"):
        causal_lm.causal_lm(MODULE, params(), tx=optax.sgd(0.1), per="word")
    with pytest.raises(ValueError, match="max_segments=None; it goes with"):
        causal_lm.causal_lm(MODULE, params(), tx=optax.sgd(0.1), per="segment")
    with pytest.raises(ValueError, match="mode is 'both'"):
        causal_lm.LoraSettings(rules=("kernel",), mode="both")


@pytest.mark.fast
def test_factors_of_an_adapter_are_split_like_their_leaf():
    rules = (r"kernel$", r"embedding$")
    settings = causal_lm.LoraSettings(rules=rules, rank=1)
    like = jax.eval_shape(params)
    module = causal_lm.causal_lm(MODULE, like, tx=optax.sgd(0.1), lora=settings)
    specs = train.specs_from_rules(
        jax.eval_shape(module.init, jax.random.key(0)), module.rules
    )
    lora, base = specs["lora"], specs["base"]
    query = {"a": P(None, "data", None), "b": P(None, None, "model")}
    assert lora["layers"]["attention"]["query"]["kernel"] == query
    assert base["layers"]["attention"]["query"]["kernel"] == P(None, "data", "model")
    down = {"a": P(None, "model", None), "b": P(None, None, "data")}
    assert lora["layers"]["mlp"]["out"]["kernel"] == down
    word = {"a": P("model", None), "b": P(None, "data")}
    assert lora["embeddings"]["word"]["embedding"] == word
