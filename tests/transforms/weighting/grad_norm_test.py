import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting


def distance(logits, losses, first, norms, alpha, target=None):
    e = np.exp(logits - logits.max())
    scaled = logits.size * e / e.sum() * norms
    rate = losses / first
    if target is None:
        target = scaled.mean() * (rate / rate.mean()) ** alpha
    return np.abs(scaled - target).sum(), target


def test_first_step_goes_down_the_published_distance():
    """Adam's first step is the sign of the gradient, here by finite differences."""
    rng = np.random.default_rng(0)
    first, losses = rng.uniform(1, 2, 4), rng.uniform(0.5, 2, 4)
    norms = rng.uniform(0.5, 2, 4)
    method = weighting.grad_norm(alpha=1.2, learning_rate=0.1, first_losses=list(first))
    params, state = method.init(4)
    state = method.update(
        state, jnp.asarray(losses, jnp.float32), norms=jnp.asarray(norms, jnp.float32)
    )
    zero = np.zeros(4)
    _, target = distance(zero, losses, first, norms, 1.2)
    slope = [
        distance(e, losses, first, norms, 1.2, target)[0]
        - distance(-e, losses, first, norms, 1.2, target)[0]
        for e in 1e-6 * np.eye(4)
    ]
    np.testing.assert_allclose(state.method.logits, -0.1 * np.sign(slope), rtol=1e-3)
    weights = method.weights(jnp.ones(4), params, state)
    assert float(weights.sum()) == pytest.approx(4, rel=1e-5)


def test_equal_rates_balance_the_norms():
    method = weighting.grad_norm(alpha=0.0, learning_rate=0.05)
    params, state = method.init(3)
    norms = jnp.array([4.0, 1.0, 2.0])
    update = jax.jit(method.update)
    for _ in range(200):
        state = update(state, jnp.ones(3), norms=norms)
    scaled = method.weights(jnp.ones(3), params, state) * norms
    np.testing.assert_allclose(scaled, scaled.mean(), rtol=0.1)


def test_first_losses_are_those_first_seen():
    method = weighting.grad_norm()
    _, state = method.init(2)
    present = jnp.array([True, False])
    state = method.update(state, jnp.array([3.0, 9.0]), present, norms=jnp.ones(2))
    np.testing.assert_array_equal(state.method.first, [3, 0])
    state = method.update(state, jnp.array([1.0, 5.0]), norms=jnp.ones(2))
    np.testing.assert_array_equal(state.method.first, [3, 5])


def test_needs_norms():
    method = weighting.grad_norm()
    with pytest.raises(ValueError, match="grad_norm: update needs `norms`"):
        method.update(method.init(2)[1], jnp.ones(2))


def test_no_task_present_moves_nothing():
    method = weighting.grad_norm()
    _, state = method.init(2)
    absent = jnp.zeros(2, bool)
    state = method.update(state, jnp.ones(2), absent, norms=jnp.ones(2))
    np.testing.assert_array_equal(state.method.logits, 0)
    np.testing.assert_array_equal(state.method.first, 0)
