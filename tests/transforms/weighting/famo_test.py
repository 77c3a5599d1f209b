import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(pairs, bounds, rate, decay):
    """The logits after Adam on each (before, after), in float64."""
    x = np.zeros(bounds.size)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, (before, after) in enumerate(pairs, 1):
        gain = np.log(before - bounds + 1e-8) - np.log(after - bounds + 1e-8)
        z = softmax(x)
        g = z * gain - z * (z @ gain) + decay * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def test_logits_follow_the_algorithm():
    rng = np.random.default_rng(0)
    before = rng.uniform(1, 3, (6, 3))
    pairs = list(zip(before, before * rng.uniform(0.5, 1.1, (6, 3)), strict=True))
    bounds = np.array([0.0, 0.2, 0.4])
    method = weighting.famo(lower_bounds=bounds, learning_rate=0.05, weight_decay=0.1)
    params, state = method.init(3)
    update = jax.jit(method.update)
    for old, new in pairs:
        state = update(
            state,
            jnp.asarray(old, jnp.float32),
            after=jnp.asarray(new, jnp.float32),
        )
    want = oracle(pairs, bounds, 0.05, 0.1)
    np.testing.assert_allclose(state.method.logits, want, rtol=1e-4, atol=1e-6)
    assert np.abs(want).max() > 0.1

    losses = np.array([1.0, 2.0, 0.7])
    share = softmax(want) / (losses - bounds + 1e-8)
    np.testing.assert_allclose(
        method.weights(jnp.asarray(losses, jnp.float32), params, state),
        share / share.sum(),
        rtol=1e-4,
    )


def test_weights_are_a_convex_combination():
    method = weighting.famo()
    weights = method.weights(jnp.array([1e-4, 1.0, 1e4]), *method.init(3))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert (weights >= 0).all()


def test_needs_the_losses_after():
    method = weighting.famo()
    _, state = method.init(2)
    with pytest.raises(ValueError, match="famo: update needs `after`"):
        method.update(state, jnp.ones(2))


def test_loss_that_fell_to_its_bound_moves_finitely():
    method = weighting.famo()
    _, state = method.init(2)
    state = method.update(state, jnp.ones(2), after=jnp.array([-1.0, 1.0]))
    assert np.isfinite(state.method.logits).all()
