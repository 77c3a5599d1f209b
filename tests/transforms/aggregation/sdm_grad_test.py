import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation


def simplex(v):
    """Projection by trying every size of support, float64."""
    best = None
    for size in range(1, len(v) + 1):
        top = np.sort(v)[::-1][:size]
        x = np.maximum(v - (top.sum() - 1) / size, 0)
        x = x / x.sum()
        if best is None or np.linalg.norm(x - v) < np.linalg.norm(best - v):
            best = x
    return best


def oracle(cross, w, preference, c=0.3, rate=10.0, momentum=0.5, steps=20):
    """The authors' inner loop, float64."""
    scaled = cross / np.sqrt(np.maximum(np.diag(cross), 0)).mean() ** 2
    velocity = np.zeros_like(w)
    for _ in range(steps):
        velocity = momentum * velocity + scaled @ (w + c * preference)
        w = simplex(w - rate * velocity)
    return (w + c * preference) / (1 + c), w


def cross_of(rng, count, scale=1.0):
    first = rng.normal(size=(count, 30))
    second = first + 0.1 * rng.normal(size=(count, 30))
    return first @ second.T * scale


@pytest.mark.parametrize("rate", [0.05, 10.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0])
def test_follows_the_algorithm_over_steps(rate, scale):
    rng = np.random.default_rng(0)
    wanted = np.array([0.5, 0.25, 0.25])
    tx = aggregation.sdm_grad(3, preference=wanted, learning_rate=rate)
    state, w = tx.rule.init(), np.full(3, 1 / 3)
    for _ in range(3):
        cross = cross_of(rng, 3, scale)
        want, w = oracle(cross, w, wanted, rate=rate)
        cross = jnp.asarray(cross, jnp.float32)
        found, state = tx.rule.weigh(jnp.eye(3), state, cross_gram=cross)
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(state, w, rtol=1e-3, atol=1e-4)


def test_strong_regularization_gives_the_preference():
    cross = jnp.asarray(cross_of(np.random.default_rng(1), 3), jnp.float32)
    found = aggregation.weights.sdm_grad(
        cross, regularization=1e6, preference=jnp.array([0.7, 0.2, 0.1])
    )
    np.testing.assert_allclose(found, [0.7, 0.2, 0.1], atol=1e-5)


def test_no_gradients_are_no_division():
    found = aggregation.weights.sdm_grad(jnp.zeros((3, 3)))
    np.testing.assert_allclose(found, np.full(3, 1 / 3), rtol=1e-5)
