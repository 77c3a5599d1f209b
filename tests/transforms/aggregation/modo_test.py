import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def simplex(v):
    """Projection by bisection on the threshold, float64."""
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        if np.maximum(v - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(v - high, 0)


def test_follows_the_algorithm_over_steps():
    rng = np.random.default_rng(0)
    tx = aggregation.modo(4, gamma=0.05, rho=0.2)
    state, want = tx.init({"w": jnp.zeros(6)}), np.full(4, 0.25)
    for _ in range(4):
        first, second, third = rng.normal(size=(3, 4, 6))
        cross = first @ second.T
        want = simplex(want - 0.05 * (cross @ want + 0.2 * want))
        out, state = tx.update(
            {"w": jnp.asarray(third, jnp.float32)},
            state,
            cross_gram=jnp.asarray(cross, jnp.float32),
        )
        np.testing.assert_allclose(state.method, want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(out["w"], want @ third, rtol=1e-3, atol=1e-5)


def test_core_is_one_step():
    cross = jnp.array([[1.0, 0.5], [-0.5, 3.0]])
    found = aggregation.weights.modo(cross, jnp.array([0.9, 0.1]), gamma=0.1, rho=0.0)
    start = np.array([0.9, 0.1])
    want = simplex(start - 0.1 * np.asarray(cross, np.float64) @ start)
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("method", [aggregation.modo, aggregation.sdm_grad])
def test_needs_the_cross_gramian(method):
    tx = method(2)
    grads = {"w": jnp.eye(2)}
    state = tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="needs cross_gram"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match=r"cross_gram is \(3, 3\), wanted \(2, 2\)"):
        tx.update(grads, state, cross_gram=jnp.eye(3))
