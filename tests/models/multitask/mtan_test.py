import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import multitask

OUTPUTS = {"a": 2, "b": 1}


def dense(width):
    return lambda: models.Mlp((width,), activation="tanh", activate_final=True)


def conv(channels, pool=True):
    return lambda: models.ConvStage(channels, pool=pool)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 4))


def test_open_masks_make_it_hard_sharing(x, fill):
    module = multitask.MTAN(OUTPUTS, stages=(dense(3), dense(4)))
    params = fill(module, x)
    for name in OUTPUTS:
        for level in range(2):
            last = params[f"attend_{name}_{level}"]["out"]
            last["kernel"] = jnp.zeros_like(last["kernel"])
            last["bias"] = jnp.full_like(last["bias"], 40.0)
    found = module.apply({"params": params}, x)
    hard = multitask.HardSharing(
        OUTPUTS,
        backbone=lambda: models.Mlp((3, 4), activation="tanh", activate_final=True),
    )
    layers = {f"layers_{i}": params[f"trunk_{i}"]["layers_0"] for i in range(2)}
    heads = {f"heads_{name}": params[f"heads_{name}"] for name in OUTPUTS}
    want = hard.apply({"params": {"encoder": layers, **heads}}, x)
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-6)


def test_masks_come_from_features_and_what_is_carried(x, fill):
    """Second stage of one task, in float64."""
    module = multitask.MTAN({"a": 2}, stages=(dense(3), dense(4)))
    params = fill(module, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def affine(layer, h):
        return h @ layer["kernel"] + layer["bias"]

    def mask(block, h):
        h = affine(block["in"], h)
        h = h - h.mean(1, keepdims=True)
        h = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-6)
        h = np.maximum(h * block["norm"]["scale"] + block["norm"]["bias"], 0)
        return 1 / (1 + np.exp(-affine(block["out"], h)))

    first = np.tanh(affine(p["trunk_0"]["layers_0"], np.asarray(x, np.float64)))
    second = np.tanh(affine(p["trunk_1"]["layers_0"], first))
    attended = mask(p["attend_a_0"], first) * first
    carried = np.maximum(affine(p["carry_a_0"]["dense"], attended), 0)
    attended = mask(p["attend_a_1"], np.concatenate([second, carried], 1)) * second
    want = affine(p["heads_a"]["output"], attended)
    found = module.apply({"params": params}, x)["a"]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize("size", [8, 9, 12])
def test_carries_maps_through_pooling(size):
    module = multitask.MTAN(OUTPUTS, stages=(conv(2), conv(3, pool=False), conv(4)))
    images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    z = jax.eval_shape(
        lambda images: module.init_with_output(
            jax.random.key(0), images, method=lambda m, i: m.decode(m.encode(i))
        )[0],
        images,
    )
    assert z["a"].shape == (2, 2)


@pytest.mark.fast
def test_mistakes_are_named(x):
    def init(stages, like):
        module = multitask.MTAN(OUTPUTS, stages=stages)
        jax.eval_shape(module.init, jax.random.key(0), like)

    with pytest.raises(ValueError, match="MTAN: stages must hold"):
        init((), x)
    flatten = lambda: models.Mlp((3,), flatten=True)  # noqa: E731
    with pytest.raises(ValueError, match="MTAN: a stage turned .* number of axes"):
        init((conv(2), flatten), jnp.zeros((2, 8, 8, 1)))
