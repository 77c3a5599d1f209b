import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weigh = jax.jit(aggregation.weights.upgrad)


def project(gram, lower, eps):
    """Dual cone projection by trying all sets of bounds, float64."""
    matrix = gram / np.trace(gram) + eps * np.eye(len(gram))
    best, found = np.inf, None
    for on in itertools.product([False, True], repeat=len(gram)):
        free = np.array(on)
        v = lower.copy()
        if free.any():
            right = -matrix[np.ix_(free, ~free)] @ v[~free]
            v[free] = np.linalg.solve(matrix[np.ix_(free, free)], right)
        if (v >= lower - 1e-12).all() and v @ matrix @ v < best:
            best, found = v @ matrix @ v, v
    return found


def oracle(gram, preference, eps=1e-4):
    rows = np.diag(np.asarray(preference, float))
    return sum(project(gram, row, eps) for row in rows)


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.sampled_from([2, 4, 50]), st.sampled_from([0, 3])
)
def test_adds_the_projections_of_all_tasks(seed, width, scale):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4, width)) * 10 ** rng.uniform(-scale, 0, (4, 1))
    preference = rng.uniform(size=4).astype(np.float32)
    w = weigh(jnp.asarray(g @ g.T, jnp.float32), preference)
    want = oracle(g @ g.T, preference)
    np.testing.assert_allclose(w, want, rtol=1e-3, atol=1e-3 * want.max())


def test_two_conflicting_tasks_lose_what_conflicts():
    """Each unit gradient less its component along the other, as a triangle shows."""
    cosine = -0.6
    gram = jnp.array([[1.0, cosine], [cosine, 1.0]])
    w = aggregation.weights.upgrad(gram, regularization=1e-7)
    np.testing.assert_allclose(w, [0.5 * (1 - cosine)] * 2, rtol=1e-4)


@pytest.mark.parametrize("width", [500, 64, 10])
def test_many_tasks(width):
    """Above 32 tasks: no task loses, and the certificate of each projection sums."""
    g = np.random.default_rng(width).normal(size=(64, width))
    gram = g @ g.T
    w = np.asarray(weigh(jnp.asarray(gram, jnp.float32)), float)
    matrix = gram / np.trace(gram) + 1e-4 * np.eye(64)
    assert w.min() >= 1 / 64 - 1e-7
    assert (matrix @ w > -1e-5).all()


def test_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"upgrad: preference is \(3,\)"):
        aggregation.weights.upgrad(jnp.eye(2), jnp.ones(3))
    with pytest.raises(ValueError, match="upgrad: regularization is -1"):
        aggregation.upgrad(regularization=-1)
