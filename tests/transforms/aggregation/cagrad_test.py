import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weigh = jax.jit(aggregation.weights.cagrad, static_argnums=1)


def certificate(g, w, c):
    """Worst inner product that d reaches, and the dual bound that its weights prove."""
    mean = g.mean(0)
    radius = c * np.linalg.norm(mean)
    share = np.asarray(w, float) - 1 / len(g)
    d = np.asarray(w, float) @ g
    assert np.linalg.norm(d - mean) <= radius * (1 + 1e-4) + 1e-12
    share = share / share.sum()
    mixed = share @ g
    return (g @ d).min(), mixed @ mean + radius * np.linalg.norm(mixed)


@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([3, 5, 40]),
    st.sampled_from([0.2, 0.5, 0.9]),
    st.sampled_from([0, 1]),
)
def test_primal_meets_dual(seed, width, c, scale):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4, width)) + rng.normal(size=width)
    g *= 10 ** rng.uniform(-scale, 0, (4, 1))
    w = np.asarray(weigh(jnp.asarray(g @ g.T, jnp.float32), c))
    assert w.min() >= 1 / 4 - 1e-6
    if np.linalg.norm(w - 1 / 4) < 1e-5 * c:
        return  # Stationary: covered below.
    primal, dual = certificate(g, w, c)
    assert abs(dual - primal) <= 1e-3 * np.max(np.sum(g * g, 1))


def test_reaches_the_radius():
    g = np.random.default_rng(0).normal(size=(5, 40))
    w = np.asarray(weigh(jnp.asarray(g @ g.T, jnp.float32), 0.5), float)
    reached = np.linalg.norm(w @ g - g.mean(0)) / np.linalg.norm(g.mean(0))
    np.testing.assert_allclose(reached, 0.5, rtol=1e-4)


def test_no_radius_is_the_mean():
    gram = jnp.array([[1.0, -0.5], [-0.5, 2.0]])
    np.testing.assert_allclose(aggregation.weights.cagrad(gram, 0.0), [0.5, 0.5])


@pytest.mark.parametrize(("rescale", "factor"), [(1, 1 / 1.16), (2, 1 / 1.4)])
def test_rescaling_divides(rescale, factor):
    gram = jnp.array([[1.0, -0.5], [-0.5, 2.0]])
    plain = aggregation.weights.cagrad(gram, 0.4)
    scaled = aggregation.weights.cagrad(gram, 0.4, rescale=rescale)
    np.testing.assert_allclose(scaled, factor * plain, rtol=1e-6)


@pytest.mark.parametrize(
    "grads",
    [
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]],
        [[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.9]],
        [[0.0, 0.0], [1.0, 2.0], [2.0, -1.0]],
    ],
)
def test_best_of_the_ball_where_a_combination_vanishes(grads):
    g = np.array(grads)
    w = np.asarray(aggregation.weights.cagrad(jnp.asarray(g @ g.T, jnp.float32), 0.5))
    mean = g.mean(0)
    d = np.asarray(w, float) @ g
    assert np.linalg.norm(d - mean) <= 0.5 * np.linalg.norm(mean) * (1 + 1e-4)
    assert np.abs(w).max() < 100
    angles = np.linspace(0, 2 * np.pi, 721)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) * np.linalg.norm(mean) / 2
    ball = np.concatenate([mean + part * circle for part in np.linspace(0, 1, 11)])
    assert (g @ d).min() >= (ball @ g.T).min(1).max() - 1e-3 * np.linalg.norm(mean)


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="cagrad: c is -1"):
        aggregation.cagrad(-1)
    with pytest.raises(ValueError, match="cagrad: rescale is 3"):
        aggregation.weights.cagrad(jnp.eye(2), rescale=3)
