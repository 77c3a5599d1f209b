"""Small models that learn from a large one, on tiny decoders."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import decoding, models, train
from mtl_jax.zoo import serving, serving_text

WORDS = 24
OPTIONS = {
    "vocab_size": WORDS,
    "width": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "mlp_dim": 32,
    "max_positions": 16,
    "scan": True,
}
LARGE, SMALL = (models.Decoder(**OPTIONS, depth=depth) for depth in (2, 1))


def weights(module, seed):
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), like["params"]
    )


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_small_models_learn_what_the_large_one_predicts():
    trainable = serving_text.distilled(LARGE, SMALL, optax.sgd(0.1))
    large, small = weights(LARGE, 0), weights(SMALL, 1)
    own = {name: x for name, x in small.items() if name != "embeddings"}
    batch = {
        "input_ids": jnp.asarray([[3, 4, 5, 6, 7, 0]], jnp.int32),
        "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32),
        "positions": jnp.asarray([[0, 1, 2, 0, 1, 0]], jnp.int32),
    }
    run = jax.jit(lambda params: trainable.loss_fn(params, batch, None)[0])
    loss = run({"large": large, "small": own})
    inputs = [batch[k] for k in ("input_ids", "segment_ids", "positions")]
    whole = {**own, "embeddings": large["embeddings"]}
    p, q = (
        softmax(np.asarray(jax.jit(module.apply)({"params": params}, *inputs), float))
        for module, params in ((LARGE, large), (SMALL, whole))
    )
    wanted = np.sum(p * (np.log(p) - np.log(q)), -1)[0, :5].mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    shapes = jax.eval_shape(trainable.init, jax.random.key(0))
    assert set(shapes["small"]) == set(own) and trainable.frozen == ("^large/",)


class Letters:
    """A token for every letter."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[1 + ord(c) % 20 for c in text])


@pytest.fixture
def ensemble(monkeypatch, quiet):
    """Makes an ensemble on a tiny decoder in the place of SmolLM2."""
    language_model = types.SimpleNamespace(
        name="tiny",
        module=LARGE,
        params=weights(LARGE, 0),
        tokenizer=Letters(),
        special={"eos": 0},
    )
    monkeypatch.setattr(serving_text.language, "smollm2", lambda **_: language_model)
    monkeypatch.setattr(
        serving_text.corpora,
        "texts",
        lambda name, split, limit: [name + split + str(i) for i in range(6)],
    )
    mesh = train.make_mesh(devices=jax.devices()[:1])
    return lambda **changes: serving_text.Texts(
        **{
            "seed": 0,
            "domains": ("red",),
            "layers": (1,),
            "documents": 6,
            "row_length": 16,
            "batch_size": 2,
            "small_steps": 2,
            "expert_steps": 1,
            "rate": 1e-2,
            "expert_rate": 1e-2,
            "test_rows": 2,
            "mesh": mesh,
            "progress": quiet,
            **changes,
        }
    )


def test_models_are_kept_and_fused(ensemble, monkeypatch):
    first = ensemble()
    monkeypatch.setattr(train, "Trainer", lambda *args, **kwargs: 1 / 0)
    again = ensemble()
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    before, after = (first.params[name]["norm"]["scale"] for name in ("small", "red"))
    assert not np.array_equal(before, after)
    for changes in ({"layers": (0,)}, {"expert_rate": 1e-3}, {"seed": 1}):
        with pytest.raises(ZeroDivisionError):
            ensemble(**changes)
    large = again.measure(serving.Steered(name="large", role="large"))
    still = again.measure(
        serving.Steered(name="still", fuse=decoding.StaticFusion(0.0))
    )
    np.testing.assert_allclose(
        [s.value for s in still], [s.value for s in large], rtol=1e-4
    )
