import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting

pytestmark = pytest.mark.fast


def oracle(history, window, temperature):
    """Equation 7 in float64 loops over complete windows."""
    whole = len(history) // window
    if whole < 2:
        return np.ones(history.shape[1])
    means = history[: whole * window].reshape(whole, window, -1).mean(1)
    scores = np.exp(means[-1] / means[-2] / temperature)
    return scores.size * scores / scores.sum()


def test_equals_the_paper_at_every_step():
    history = np.random.default_rng(0).uniform(0.5, 3.0, (9, 3))
    method = weighting.dwa(window=2, temperature=1.5)
    params, state = method.init(3)
    update = jax.jit(method.update)
    for step, losses in enumerate(history):
        np.testing.assert_allclose(
            method.weights(jnp.ones(3), params, state),
            oracle(history[:step], 2, 1.5),
            rtol=1e-5,
        )
        state = update(state, jnp.asarray(losses, jnp.float32))


def test_zero_mean_and_absent_task_keep_ratio_one():
    method = weighting.dwa(window=1)
    params, state = method.init(2)
    present = jnp.array([True, False])
    for _ in range(3):
        state = method.update(state, jnp.zeros(2), present)
    np.testing.assert_allclose(method.weights(jnp.ones(2), params, state), 1)
