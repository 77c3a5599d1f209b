import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import LayerNorm, RmsNorm

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


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_is_the_paper(unit_offset):
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    scale = np.linspace(0.5, 2, 16)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2)
    params = {"scale": jnp.asarray(scale, "f4")}
    got = RmsNorm(1e-2, unit_offset).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want * (scale + unit_offset), atol=1e-5)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_starts_as_a_plain_norm_and_keeps_dtypes(unit_offset):
    x = jnp.arange(8, dtype=jnp.bfloat16)[None]
    module = RmsNorm(unit_offset=unit_offset)
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["scale"].dtype == jnp.float32
    got = module.apply(variables, x)
    assert got.dtype == jnp.bfloat16
    wide = np.arange(8.0)
    want = wide / np.sqrt((wide**2).mean())
    np.testing.assert_allclose(got[0].astype(jnp.float32), want, rtol=1e-2)
    assert RmsNorm(dtype=jnp.float32).apply(variables, x).dtype == jnp.float32
