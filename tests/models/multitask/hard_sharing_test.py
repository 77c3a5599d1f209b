import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


def test_all_heads_read_the_encoder(fill):
    module = models.multitask.HardSharing(
        {"a": 2, "b": 1}, backbone=lambda: models.Mlp((3,))
    )
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    params = fill(module, x)
    layer = params["encoder"]["layers_0"]
    h = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    found = module.apply({"params": params}, jnp.asarray(x))
    for name in ("a", "b"):
        head = params[f"heads_{name}"]["output"]
        want = h @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)


def test_a_new_head_lets_gradients_through_to_the_encoder():
    """`Classifier` starts from zero, where no shared gradient exists yet."""
    import jax

    module = models.multitask.HardSharing(
        {"a": 2}, backbone=lambda: models.Mlp((3,), activate_final=True)
    )
    x = jnp.ones((4, 5))
    params = module.init(jax.random.key(0), x)["params"]
    grads = jax.grad(lambda p: module.apply({"params": p}, x)["a"].sum())(params)
    assert np.abs(grads["encoder"]["layers_0"]["bias"]).max() > 0
