"""The step of an expert, for machines that are not here."""

import math

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import configs, run, train
from mtl_jax.run import embedding

pytestmark = pytest.mark.fast
CONFIG = "experiments/configs/self_positioning.py"


def step_of(variant, **changes):
    config = configs.load_config(f"{CONFIG}:{variant}", changes)
    return embedding.contrastive_step(config, None, None)


@pytest.mark.parametrize(("variant", "layers"), [("paper", 6), ("demo", 2)])
def test_parameters_are_those_of_minilm(variant, layers):
    trainable, batch = step_of(variant)
    shapes = jax.eval_shape(trainable.init, jax.random.key(0))
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    embeddings = (30522 + 512 + 2 + 2) * 384
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert found == layers * layer + (embeddings if variant == "paper" else 0)
    rows = 1024 if variant == "paper" else 24
    assert {len(x) if x.ndim else 0 for x in jax.tree.leaves(batch)} == {rows}


def test_large_leaves_are_split_and_the_step_is_a_step():
    trainable, batch = step_of("tiny")
    mesh = train.make_mesh(data=2, devices=jax.devices()[:2])
    state = train.Trainer(trainable, mesh=mesh).abstract_state
    whole = max(jax.tree.leaves(state.params), key=lambda x: math.prod(x.shape))
    part = whole.sharding.shard_shape(whole.shape)
    assert 2 * math.prod(part) == math.prod(whole.shape)
    key = jax.random.key(0)
    loss, grads = jax.eval_shape(
        jax.value_and_grad(lambda p, b: trainable.loss_fn(p, b, key)[0]),
        jax.eval_shape(trainable.init, key),
        batch,
    )
    assert loss.shape == () and loss.dtype == jnp.float32
    assert jax.tree.structure(grads) == jax.tree.structure(state.params)


def test_rows_are_no_steps():
    config = configs.load_config(f"{CONFIG}:paper", {})
    with pytest.raises(ValueError, match="training an expert, found method 'average'"):
        run.preflight(config, topology="v5e:2x2", method="average")
    config.material.name = "bert"
    with pytest.raises(ValueError, match="material 'bert' does not exist; known: inv"):
        run.preflight(config, topology="v5e:2x2")
