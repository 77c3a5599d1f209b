import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.multitask import CrossStitch

OUTPUTS = {"a": 2, "b": 1, "c": 2}


def dense(width):
    return lambda: models.Mlp((width,), activation="tanh", activate_final=True)


def make(**options):
    return CrossStitch(OUTPUTS, stages=(dense(4), dense(3)), **options)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 6))


def forward(params, x, matrices):
    """The network in float64 loops."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    columns = [np.asarray(x, np.float64)] * 3
    for level in range(2):
        layers = [p[f"columns_{t}_{level}"]["layers_0"] for t in range(3)]
        columns = [
            np.tanh(h @ layer["kernel"] + layer["bias"])
            for h, layer in zip(columns, layers, strict=True)
        ]
        a = np.asarray(matrices[level], np.float64)
        columns = [sum(a[t, s] * columns[s] for s in range(3)) for t in range(3)]
    return {
        name: columns[t] @ p[f"heads_{name}"]["output"]["kernel"]
        + p[f"heads_{name}"]["output"]["bias"]
        for t, name in enumerate(OUTPUTS)
    }


@pytest.mark.parametrize("per_channel", [False, True])
def test_mixes_after_every_stage(per_channel, x, fill):
    module = make(per_channel=per_channel)
    params = fill(module, x)
    matrices = [params[f"stitches_{level}"]["matrix"] for level in range(2)]
    assert matrices[0].shape == ((3, 3, 4) if per_channel else (3, 3))
    found = module.apply({"params": params}, x)
    for name, want in forward(params, x, matrices).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)


def test_identity_makes_columns_independent(x, fill):
    module = make(keep=1.0)
    params = fill(module, x)
    for level in range(2):
        params[f"stitches_{level}"]["matrix"] = jnp.eye(3)
    found = module.apply({"params": params}, x)
    for t, name in enumerate(OUTPUTS):
        alone = CrossStitch({name: OUTPUTS[name]}, stages=module.stages)
        own = {
            **{
                f"columns_0_{level}": params[f"columns_{t}_{level}"] for level in (0, 1)
            },
            **{f"stitches_{level}": {"matrix": jnp.ones((1, 1))} for level in (0, 1)},
            f"heads_{name}": params[f"heads_{name}"],
        }
        want = alone.apply({"params": own}, x)[name]
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_starts_with_most_weight_on_the_own_column():
    matrix = models.multitask.cross_stitch.StitchMatrix(3, keep=0.8)
    found = matrix.init(jax.random.key(0), 4)["params"]["matrix"]
    want = np.full((3, 3), 0.1) + 0.7 * np.eye(3)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.fast
def test_no_stages_are_refused(x):
    with pytest.raises(ValueError, match="CrossStitch: stages must hold"):
        jax.eval_shape(CrossStitch(OUTPUTS, stages=()).init, jax.random.key(0), x)
