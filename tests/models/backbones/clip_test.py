import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtl_jax import models, tree
from mtl_jax.train import sharding

BLOCKS = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12, "projection": 5}
VISION = {"image_size": 8, "patch_size": 4, **BLOCKS}
TEXT = {"vocab_size": 11, "max_positions": 7, "end_token": 9, **BLOCKS}
IMAGES = jax.random.normal(jax.random.key(7), (3, 8, 8, 3))
IDS = jnp.array([[1, 4, 9, 0, 0], [1, 9, 10, 9, 9], [3, 2, 5, 6, 9]], jnp.int32)


def text(**options):
    return models.ClipText(**{**TEXT, **options})


def both(**options):
    return models.Clip(VISION, TEXT, **options)


def run(module, params, *inputs, **options):
    apply = functools.partial(module.apply, **options)
    return jax.jit(apply)({"params": params}, *inputs)


@pytest.mark.parametrize(
    ("name", "count"),
    # As published with the checkpoints.
    [
        ("clip-b/32", 151_277_313),
        ("clip-b/16", 149_620_737),
        ("clip-l/14", 427_616_513),
    ],
)
def test_parameter_counts_of_the_published_sizes(name, count):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    module = models.build(name, scan=True)
    params = jax.eval_shape(module.init, jax.random.key(0), image, ids)["params"]
    assert tree.size(params) == count
    towers = {"b": "clip-text-b", "l": "clip-text-l"}
    tower = models.build(towers[name[5]], scan=True)
    alone = jax.eval_shape(tower.init, jax.random.key(0), ids)["params"]
    assert alone == params["text"]
    tower = models.build(name.replace("clip-", "clip-vit-"), scan=True)
    alone = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    assert alone == params["vision"]


def test_the_end_token_is_pooled_where_it_first_occurs(fill):
    params = fill(text(), IDS)
    tokens = run(text(pool="none"), params, IDS)
    assert tokens.shape == (3, 5, 5)
    got = run(text(), params, IDS)
    want = [tokens[0, 2], tokens[1, 1], tokens[2, 4]]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-6)
    got = run(text(end_token=None), params, IDS)
    want = [tokens[0, 2], tokens[1, 2], tokens[2, 4]]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-6)


def test_nothing_after_the_end_token_is_read(fill):
    params = fill(text(), IDS)
    got = run(text(), params, IDS)
    other = IDS.at[0, 3:].set(jnp.array([7, 8])).at[1, 2:].set(3)
    np.testing.assert_array_equal(run(text(), params, other), got)
    mask = (jnp.arange(5)[None] <= jnp.array([[2], [1], [4]])).astype(jnp.int32)
    np.testing.assert_allclose(run(text(), params, other, mask), got, atol=1e-6)
    for n in range(3):
        length = int(mask[n].sum())
        alone = run(text(), params, IDS[n : n + 1, :length])
        np.testing.assert_allclose(alone[0], got[n], atol=1e-5)
    # What lies before is read, in its order.
    swapped = IDS.at[2, :2].set(IDS[2, 1::-1])
    assert np.abs(run(text(), params, swapped)[2] - got[2]).max() > 1e-3


def test_bf16_compute_scan_and_remat_together(fill):
    module = text(dtype=jnp.bfloat16, scan=True, remat=True, depth=2)
    params = fill(module, IDS)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    got = run(module, params, IDS)
    assert got.dtype == jnp.bfloat16
    unrolled = models.unstack_layers(params)
    want = run(text(depth=2), unrolled, IDS)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.15)
    hidden = run(text(depth=2), unrolled, IDS, return_hidden=True)
    assert [x.shape for x in hidden] == [(3, 5, 8)] * 3


def test_logits_are_scaled_cosines_of_both_towers(fill):
    module = both(scan=True)
    params = {**fill(module, IMAGES, IDS), "logit_scale": jnp.float32(1.5)}
    got = run(module, params, IMAGES, IDS[:2])
    images, texts = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (
            run(module, params, IMAGES, method="encode_images"),
            run(module, params, IDS[:2], method="encode_texts"),
        )
    )
    assert got.shape == (3, 2)
    np.testing.assert_allclose(got, np.exp(1.5) * images @ texts.T, atol=1e-5)
    start = jax.jit(module.init)(jax.random.key(0), IMAGES, IDS)["params"]
    assert start["logit_scale"] == pytest.approx(2.6592, abs=1e-4)


def test_every_leaf_has_a_sharding_rule(fill):
    params = fill(both(scan=True), IMAGES, IDS)
    rules = models.sharding_rules(both())
    specs = sharding.specs_from_rules(params, rules)
    assert specs["text"]["layers"]["mlp"]["in"]["kernel"] == P(None, "data", "model")
    assert specs["vision"]["patch_embed"]["kernel"] == P(None, "data")
    sharding.specs_from_rules(fill(text(), IDS), models.sharding_rules(text()))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"pool": "max"}, (IDS,), "pool must be"),
        ({}, (jnp.zeros((1, 8), jnp.int32),), r"L at most 7, found \(1, 8\)"),
        ({}, (IDS[0],), r"input_ids must be \[B, L\]"),
        ({}, (IDS, IDS[:, :2]), r"attention_mask is \(3, 2\)"),
    ],
)
def test_misfits_are_refused_by_name(options, inputs, message):
    with pytest.raises(ValueError, match=f"ClipText: .*{message}"):
        jax.eval_shape(text(**options).init, jax.random.key(0), *inputs)


@pytest.mark.fast
def test_towers_must_meet_in_one_space():
    for options in ({**TEXT, "projection": 4}, {**TEXT, "projection": None}):
        module = models.Clip(VISION, options)
        with pytest.raises(ValueError, match="projections of one width, found 5 and"):
            jax.eval_shape(module.init, jax.random.key(0), IMAGES, IDS)
