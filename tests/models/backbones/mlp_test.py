import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("activate_final", [False, True])
def test_layers_in_order(activate_final):
    x = jax.random.normal(jax.random.key(1), (4, 3))
    module = models.Mlp((6, 2), activate_final=activate_final)
    variables = module.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = np.maximum(np.asarray(x) @ p["layers_0"]["kernel"] + p["layers_0"]["bias"], 0)
    y = y @ p["layers_1"]["kernel"] + p["layers_1"]["bias"]
    want = np.maximum(y, 0) if activate_final else y
    np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-6)


def test_flatten_takes_images_and_bias_may_go():
    module = models.Mlp((2,), flatten=True, use_bias=False)
    variables = module.init(jax.random.key(0), jnp.ones((5, 4, 4, 3)))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "layers_0": {"kernel": (48, 2)}
    }
    assert module.apply(variables, jnp.ones((5, 4, 4, 3))).shape == (5, 2)


def test_no_layers_is_refused():
    with pytest.raises(ValueError, match="Mlp: features"):
        models.Mlp(()).init(jax.random.key(0), jnp.ones((1, 2)))
