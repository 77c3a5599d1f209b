import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting

pytestmark = pytest.mark.fast

LOSSES = np.array([0.5, 2.0, 4.0], np.float32)


def train(method, steps=300):
    params, state = method.init(3)
    slope = jax.jit(jax.grad(method.loss, argnums=1))
    for _ in range(steps):
        grads = slope(jnp.asarray(LOSSES), params, state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params


def test_learns_the_log_of_the_losses():
    """d/ds: f exp(-s) L = 1/2, so s = log(2 f L)."""
    factors = np.array([0.5, 0.5, 1.0])
    params = train(weighting.uncertainty(factors=list(factors)))
    np.testing.assert_allclose(
        params["log_variance"], np.log(2 * factors * LOSSES), rtol=1e-3, atol=1e-4
    )


def test_imtl_l_scales_every_loss_to_one():
    params = train(weighting.imtl_l())
    np.testing.assert_allclose(np.exp(params["log_scale"]) * LOSSES, 1, rtol=1e-3)
