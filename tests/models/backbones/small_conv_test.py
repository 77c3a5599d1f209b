import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("size", "map_size"), [(12, 3), (28, 7), (36, 9), (9, 3)])
def test_shapes_for_small_images(size, map_size):
    images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)

    def run(**options):
        module = models.SmallConv((4, 6), **options)
        return jax.eval_shape(module.init_with_output, jax.random.key(0), images)[0]

    assert run(width=5).shape == (2, 5)
    assert run(width=None).shape == (2, map_size, map_size, 6)


def test_a_stage_convolves_activates_and_pools(fill):
    module = models.ConvStage(2)
    image = np.random.default_rng(0).normal(size=(1, 5, 5, 1)).astype(np.float32)
    params = fill(module, image)
    kernel = np.asarray(params["conv"]["kernel"], np.float64)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0))).astype(np.float64)
    want = np.empty((5, 5, 2))
    for i in range(5):
        for j in range(5):
            patch = padded[i : i + 3, j : j + 3, :, None]
            want[i, j] = (patch * kernel).sum((0, 1, 2)) + params["conv"]["bias"]
    want = np.maximum(want, 0)
    # The odd last row and column are pooled alone.
    want = np.pad(want, ((0, 1), (0, 1), (0, 0))).reshape(3, 2, 3, 2, 2).max((1, 3))
    found = module.apply({"params": params}, jnp.asarray(image))[0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 1)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_pooling_is_linens_with_its_gradient(window, size):
    import flax.linen as nn

    from mtl_jax.models.backbones.small_conv import max_pool

    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    rest = [(0, -n % w) for n, w in zip(size, window, strict=True)]

    def linen(x):
        x = jnp.pad(x, ((0, 0), *rest, (0, 0)), constant_values=-jnp.inf)
        return nn.max_pool(x, window, window)

    want, pull = jax.vjp(linen, x)
    found, own_pull = jax.vjp(lambda x: max_pool(x, window), x)
    np.testing.assert_array_equal(found, want)
    weights = jax.random.normal(jax.random.key(1), want.shape)
    np.testing.assert_allclose(own_pull(weights)[0], pull(weights)[0], rtol=1e-6)


def test_features_know_where_things_are(fill):
    """The same stroke in two corners must not look alike."""
    module = models.SmallConv((3,), width=4)
    left = jnp.zeros((1, 12, 12, 1)).at[:, 2:4, 2:4].set(1.0)
    right = jnp.zeros((1, 12, 12, 1)).at[:, 8:10, 8:10].set(1.0)
    params = fill(module, left)
    found = [module.apply({"params": params}, image) for image in (left, right)]
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_rules_cover_every_leaf_and_images_are_asked_for():
    import re

    from mtl_jax import tree

    module = models.build("small-conv", channels=[4])
    images = jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rules = models.sharding_rules(module)
    for path in tree.paths(params):
        assert any(re.search(regex, path) for regex, _ in rules), path
    with pytest.raises(ValueError, match=r"ConvStage: wanted \[B, H, W, C\], found"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 12)))
