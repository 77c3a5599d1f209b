import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weigh = jax.jit(aggregation.weights.dual_proj)


def oracle(gram, lower, eps=1e-4):
    """Tries all sets of bounds that are met, float64."""
    matrix = gram / np.trace(gram) + eps * np.eye(len(gram))
    best, found = np.inf, None
    for on in itertools.product([False, True], repeat=len(gram)):
        free = np.array(on)
        v = lower.astype(float).copy()
        if free.any():
            right = -matrix[np.ix_(free, ~free)] @ v[~free]
            v[free] = np.linalg.solve(matrix[np.ix_(free, free)], right)
        if (v >= lower - 1e-12).all() and v @ matrix @ v < best:
            best, found = v @ matrix @ v, v
    return found


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.sampled_from([2, 4, 50]), st.sampled_from([0, 3])
)
def test_projects_the_preferred_mix(seed, width, scale):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4, width)) * 10 ** rng.uniform(-scale, 0, (4, 1))
    preference = rng.uniform(size=4).astype(np.float32)
    w = weigh(jnp.asarray(g @ g.T, jnp.float32), preference)
    want = oracle(g @ g.T, preference)
    np.testing.assert_allclose(w, want, rtol=1e-3, atol=1e-3 * want.max())


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_is_the_nearest_direction_without_conflict(seed):
    """Against the primal: no closer point of the cone {d: J d >= 0} is found."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(3, 8))
    w = weigh(jnp.asarray(g @ g.T, jnp.float32), jnp.full(3, 1 / 3))
    mix, d = g.mean(0), np.asarray(w, float) @ g
    assert (g @ d > -2e-3 * np.sum(g * g)).all()
    for _ in range(200):
        other = d + rng.normal(size=8) * 10 ** rng.uniform(-3, 0)
        if (g @ other >= 0).all():
            assert np.linalg.norm(other - mix) > np.linalg.norm(d - mix) - 3e-3


def test_leaves_agreeing_tasks_alone():
    w = aggregation.weights.dual_proj(jnp.array([[1.0, 0.5], [0.5, 2.0]]))
    np.testing.assert_array_equal(w, [0.5, 0.5])


def test_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"dual_proj: preference is \(3,\)"):
        aggregation.weights.dual_proj(jnp.eye(2), jnp.ones(3))
    with pytest.raises(ValueError, match="dual_proj: regularization is 0"):
        aggregation.dual_proj(regularization=0)
    with pytest.raises(ValueError, match=r"dual_proj: gram is \(2, 3\)"):
        aggregation.weights.dual_proj(jnp.ones((2, 3)))


def test_preference_of_the_aggregator():
    tx = aggregation.dual_proj(jnp.array([1.0, 0.0]))
    grads = {"w": jnp.array([[1.0, 0.0], [0.5, 1.0]])}
    updates, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    np.testing.assert_allclose(updates["w"], [1, 0], atol=1e-6)
