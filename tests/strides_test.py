"""How arrays lie in memory."""

import chex
import jax
import jax.numpy as jnp
import pytest

from mtl_jax import _strides


@pytest.mark.parametrize("devices", [1, 2])
def test_as_rows_is_the_identity_laid_out_on_one_device(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x = jnp.arange(24.0).reshape(2, 3, 4)

    def turned(x):
        return _strides.as_rows(jnp.moveaxis(x, 0, -2))

    chex.assert_trees_all_equal(jax.jit(turned)(x), jnp.moveaxis(x, 0, -2))
    chex.assert_trees_all_equal(jax.vmap(turned)(x), jnp.moveaxis(x, 1, -2))
    chex.assert_trees_all_equal(
        jax.grad(lambda x: turned(x).sum())(x), jnp.ones_like(x)
    )
    lowered = jax.jit(turned).lower(x).as_text()
    assert ("LayoutConstraint" in lowered) == (devices == 1)
