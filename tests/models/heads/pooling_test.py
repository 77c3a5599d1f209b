import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_mean_over_active_positions_only(dtype):
    hidden = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    want = [hidden[0].mean(0), hidden[1, [0, 2]].mean(0), np.zeros(5)]
    got = models.mean_pool(jnp.asarray(hidden), jnp.asarray(mask, dtype))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_bf16_is_accumulated_in_float32():
    hidden = jnp.ones((1, 1000, 1), jnp.bfloat16)
    got = models.mean_pool(hidden, jnp.ones((1, 1000), jnp.int32))
    assert got.dtype == jnp.bfloat16
    assert got[0, 0] == 1


def test_gradient_of_an_empty_row_is_zero():
    grad = jax.grad(lambda h: models.mean_pool(h, jnp.zeros((1, 2), jnp.int32)).sum())(
        jnp.ones((1, 2, 3))
    )
    np.testing.assert_array_equal(grad, np.zeros((1, 2, 3)))


def test_shapes_are_refused():
    with pytest.raises(ValueError, match="mean_pool"):
        models.mean_pool(jnp.ones((2, 3, 4)), jnp.ones((2, 4)))
