import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("mu", [1.0, 0.1, 1e-3])
def test_between_the_maximum_and_the_maximum_plus_mu_log_tasks(mu):
    losses = np.array([1.0, 3.0, 2.9])
    method = weighting.stch(mu=mu)
    value = float(method.loss(jnp.asarray(losses, jnp.float32), *method.init(3)))
    top = losses.max() / 3
    assert top - 1e-6 <= value <= top + mu * np.log(3) + 1e-6


def test_large_losses_do_not_overflow():
    method = weighting.stch(mu=1e-3)
    value, weights = jax.value_and_grad(method.loss)(
        jnp.array([1e6, 2e6]), *method.init(2)
    )
    assert float(value) == 1e6
    np.testing.assert_allclose(weights, [0, 0.5])


def test_logarithmic_form_after_the_warmup():
    rng = np.random.default_rng(0)
    history = rng.uniform(0.5, 3, (5, 3))
    method = weighting.stch(mu=0.4, warmup=2)
    params, state = method.init(3)
    update = jax.jit(method.update)
    for step, losses in enumerate(history):
        x = jnp.asarray(losses, jnp.float32)
        if step < 2:
            want = np.log(losses).sum()
        else:
            nadir = history[:2].mean(0)
            want = 3 * 0.4 * np.log(((losses / nadir) ** (1 / 0.4)).sum())
        np.testing.assert_allclose(method.loss(x, params, state), want, rtol=1e-4)
        state = update(state, x)
