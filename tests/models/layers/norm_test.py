import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import LayerNorm

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_statistics_hold_under_a_large_offset(offset):
    x = np.random.default_rng(0).normal(size=(3, 16)) + offset
    x = x.astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 16), np.linspace(-1, 1, 16)
    y = x.astype(np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    params = {"scale": jnp.asarray(scale, "f4"), "bias": jnp.asarray(bias, "f4")}
    got = LayerNorm(1e-5).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, y * scale + bias, atol=3e-6 + 1e-6 * offset)


def test_dtype_follows_the_input_unless_told():
    x = jnp.arange(8, dtype=jnp.bfloat16)[None]
    variables = LayerNorm().init(jax.random.key(0), x)
    assert variables["params"]["scale"].dtype == jnp.float32
    assert LayerNorm().apply(variables, x).dtype == jnp.bfloat16
    assert LayerNorm(dtype=jnp.float32).apply(variables, x).dtype == jnp.float32
