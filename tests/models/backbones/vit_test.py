import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models, tree
from mtl_jax.models.backbones import vit


def tiny(**options):
    return models.ViT(
        **{
            "image_size": 8,
            "patch_size": 4,
            "width": 8,
            "depth": 2,
            "num_heads": 2,
            **options,
        }
    )


def run(module, params, *inputs, **options):
    apply = functools.partial(module.apply, **options)
    return jax.jit(apply)({"params": params}, *inputs)


IMAGES = jax.random.normal(jax.random.key(7), (3, 8, 8, 3))


@pytest.mark.fast
def test_patches_keep_rows_columns_channels_in_order():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    got = vit.patches(jnp.asarray(images), 2)
    assert got.shape == (2, 6, 12)
    for n in range(6):
        row, column = 2 * (n // 3), 2 * (n % 3)
        block = images[:, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(got[:, n], block.reshape(2, 12))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # patch p*p*3*D + D, class token D, positions (N + 1) D, L blocks of
        # 12 D^2 + 13 D, last norm 2 D; CLIP: no patch bias, one more norm, D * P.
        ("vit-b/32", 87_455_232),
        ("vit-l/14", 303_178_752),
        ("vit-l/16", 303_301_632),
        ("clip-vit-b/32", 87_849_216),
        ("clip-vit-l/14", 303_966_208),
    ],
)
def test_parameter_counts_of_the_published_sizes(name, count):
    module = models.build(name)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    d, p, depth = module.width, module.patch_size, module.depth
    by_hand = p * p * 3 * d + d + ((224 // p) ** 2 + 1) * d + 2 * d
    by_hand += depth * (12 * d * d + 13 * d)
    by_hand += d if module.patch_bias else 2 * d + d * module.projection
    assert tree.size(params) == by_hand == count


@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_pools_read_the_same_tokens(fill, pool):
    module = tiny(pool=pool)
    params = fill(module, IMAGES)
    got = run(module, params, IMAGES)
    if pool == "none":
        assert got.shape == (3, 5, 8)
        want = run(tiny(pool="cls"), params, IMAGES)
        np.testing.assert_allclose(got[:, 0], want, atol=1e-6)
    else:
        assert got.shape == (3, 8)
    tokens = run(module, params, IMAGES, return_hidden=True)
    assert len(tokens) == 3
    assert tokens[-1].shape == (3, 4 if pool == "mean" else 5, 8)
    assert ("cls_token" in params) == (pool != "mean")


def test_clip_options_add_what_they_say(fill):
    module = tiny(projection=5, **vit.CLIP_OPTIONS)
    params = fill(module, IMAGES)
    assert run(module, params, IMAGES).shape == (3, 5)
    assert set(params["projection"]) == {"kernel"}
    assert set(params["patch_embed"]) == {"kernel"}
    assert "norm_pre" in params
    entering = run(module, params, IMAGES, return_hidden=True)[0]
    norm = params["norm_pre"]
    plain = (entering - norm["bias"][None, None]) / norm["scale"][None, None]
    np.testing.assert_allclose(plain.mean(-1), jnp.zeros((3, 5)), atol=1e-5)
    np.testing.assert_allclose(plain.var(-1), jnp.ones((3, 5)), atol=1e-3)


def test_bf16_compute_scan_and_remat_together(fill):
    module = tiny(dtype=jnp.bfloat16, scan=True, remat=True, projection=5)
    params = fill(module, IMAGES)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    got = run(module, params, IMAGES)
    assert got.dtype == jnp.bfloat16
    want = run(tiny(projection=5), models.unstack_layers(params), IMAGES)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)


def test_the_order_of_patches_matters(fill):
    """Kills position embeddings that are dropped."""
    module = tiny()
    params = fill(module, IMAGES)
    swapped = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
    assert not np.allclose(
        run(module, params, IMAGES), run(module, params, swapped), atol=1e-6
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"pool": "max"}, IMAGES, "pool must be"),
        ({"patch_size": 3}, IMAGES, "patch_size must divide"),
        ({}, IMAGES[:, :4], r"images must be \[B, 8, 8, C\]"),
        ({}, IMAGES[0], "images must be"),
    ],
)
def test_misfits_are_refused_by_name(options, images, message):
    with pytest.raises(ValueError, match=f"ViT: {message}"):
        jax.eval_shape(tiny(**options).init, jax.random.key(0), images)
