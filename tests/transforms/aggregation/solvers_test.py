import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms.aggregation import _rows, _solvers

project = jax.jit(_solvers.project_simplex)
follow = jax.jit(_solvers.nonnegative_path)
above = jax.jit(_solvers.quadratic_above, static_argnames="ridge")
nearest = jax.jit(_solvers.min_norm_point)


def unit_rows(seed, count, width):
    g = np.random.default_rng(seed).normal(size=(count, width))
    return g / np.linalg.norm(g, axis=1, keepdims=True)


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([1e-3, 1.0, 1e6]))
def test_simplex_projection_is_the_nearest_point(seed, size):
    v = (size * np.random.default_rng(seed).normal(size=5)).astype(np.float32)
    x = np.asarray(project(v), float)
    assert x.min() >= 0
    np.testing.assert_allclose(x.sum(), 1, rtol=1e-6)
    # Optimal: v - x is largest, and the same, wherever x is positive.
    gap = v - x
    assert (gap[x > 0] >= gap.max() - 4e-6 * max(size, 1)).all()


def test_simplex_projection_keeps_points_of_the_simplex():
    x = jnp.array([0.25, 0.0, 0.75])
    np.testing.assert_allclose(project(x), x, atol=1e-7)
    np.testing.assert_allclose(_solvers.project_simplex(2 * x, 2.0), 2 * x, atol=1e-6)


def nonnegative_oracle(matrix, linear):
    """Tries all supports of `min_{x >= 0} x^T A x / 2 + q^T x`."""
    best, found = np.inf, None
    for on in itertools.product([False, True], repeat=len(linear)):
        on = np.array(on)
        x = np.zeros(len(linear))
        if on.any():
            x[on] = np.linalg.lstsq(matrix[np.ix_(on, on)], -linear[on], rcond=None)[0]
        value = x @ matrix @ x / 2 + linear @ x
        if x.min() >= -1e-12 and value < best:
            best, found = value, x
    return found


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([3, 4, 20]))
def test_path_ends_at_the_minimiser(seed, width):
    g = unit_rows(seed, 4, width)
    matrix = g @ g.T + 1e-3 * np.eye(4)
    linear = np.random.default_rng(seed + 1).normal(size=4)
    got = follow(
        jnp.asarray(matrix, jnp.float32),
        jnp.asarray(linear, jnp.float32),
        jnp.ones(4),
    )
    want = nonnegative_oracle(matrix, linear)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3 * np.abs(want).max())


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1.0, 3.0]))
def test_path_stops_at_the_radius(seed, radius):
    g = unit_rows(seed, 4, 6)
    linear = np.random.default_rng(seed + 1).normal(size=4)
    x = np.asarray(
        jax.jit(_solvers.nonnegative_path)(
            jnp.asarray(g @ g.T, jnp.float32),
            jnp.asarray(linear, jnp.float32),
            jnp.ones(4),
            end=-jnp.inf,
            radius=jnp.float32(radius),
        ),
        float,
    )
    np.testing.assert_allclose(np.linalg.norm(x @ g), radius, rtol=1e-4)
    # One mu explains all entries: the slope is -mu where x > 0, no less elsewhere.
    slope = g @ g.T @ x + linear
    assert np.ptp(slope[x > 0]) < 1e-3
    assert slope.min() > slope[x > 0].max() - 1e-3


@pytest.mark.parametrize(
    ("count", "width", "scale"),
    [(5, 20, 0), (5, 2, 0), (40, 200, 0), (40, 5, 0), (40, 200, 2), (37, 5, 1)],
)
def test_quadratic_above_is_optimal(count, width, scale):
    rng = np.random.default_rng(count + width)
    g = rng.normal(size=(count, width)) * 10 ** rng.uniform(-scale, scale, (count, 1))
    gram = g @ g.T
    matrix = gram / np.trace(gram) + 1e-3 * np.eye(count)
    lower = np.float32(rng.uniform(0, 1, (count, count)) * np.eye(count))
    v = np.asarray(above(jnp.asarray(matrix, jnp.float32), lower, ridge=1e-3), float)
    assert (v >= lower).all()
    # Multipliers A v are non-negative, and zero above the bounds: the duality gap.
    slope = v @ matrix
    size = np.sqrt(np.einsum("ij,jk,ik->i", v, matrix, v))
    unit = np.sqrt(np.diag(matrix))
    assert (slope / unit > -2e-4 * size[:, None]).all()
    gap = np.sum(np.maximum(slope, 0) * (v - lower), 1)
    assert (gap < 2e-4 * size**2 + 1e-6).all()


def exact_above(matrix, row):
    """Block pivots in float64; single ones, the last first, when those cycle."""
    offset = matrix @ row
    free = offset < 0
    for turn in range(500):
        x = np.zeros(len(row))
        x[free] = np.linalg.solve(matrix[np.ix_(free, free)], -offset[free])
        slope = matrix @ x + offset
        wrong = np.where(free, x < -1e-12, slope < -1e-12)
        if not wrong.any():
            return row + x
        if turn > 20:  # Murty's rule always ends.
            wrong[: np.flatnonzero(wrong)[-1]] = False
        free = free ^ wrong
    raise AssertionError("no solution")


@pytest.mark.parametrize("rank", [2, 7, 20, 39, 400])
def test_all_rows_against_float64(rank):
    """Gramians of low rank and of full, with lengths an order apart."""
    rng = np.random.default_rng(rank)
    g = rng.normal(size=(40, rank)) * 10 ** rng.uniform(-0.5, 0.5, (40, 1))
    matrix = g @ g.T / np.trace(g @ g.T) + 1e-4 * np.eye(40)
    want = np.stack([exact_above(matrix, row) for row in np.eye(40)])
    got = above(jnp.asarray(matrix, jnp.float32), jnp.eye(40), ridge=1e-4)
    # Rounding of the Gramian, against a ridge of 1e-4 of its trace.
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose(got.sum(0), want.sum(0), atol=3e-4 * want.sum(0).max())


@pytest.mark.parametrize(("rank", "most"), [(7, 3), (39, 0), (400, 0)])
def test_rows_settle_without_their_paths(rank, most):
    g = unit_rows(0, 48, rank)
    matrix = g @ g.T + 0.01 * np.eye(48)
    scaled = jnp.asarray(matrix / 1.01, jnp.float32)
    found = jax.jit(_rows.solve_rows)(scaled, jnp.full(48, 0.01 / 1.01), jnp.eye(48))
    assert int(np.sum(~found.settled)) <= most
    want = np.stack([exact_above(matrix / 1.01, row) for row in np.eye(48)])
    done = np.asarray(found.settled)
    np.testing.assert_allclose(
        (np.eye(48) + found.heights)[done], want[done], atol=3e-4 * want.max()
    )


@pytest.mark.parametrize("rank", [4, 12])
def test_many_tasks_and_few_agree(rank, monkeypatch):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(12, rank))
    matrix = jnp.asarray(g @ g.T / np.trace(g @ g.T) + 1e-4 * np.eye(12), jnp.float32)
    solve = functools.partial(_solvers.quadratic_above, matrix, jnp.eye(12), ridge=1e-4)
    want = solve()
    monkeypatch.setattr(_solvers, "_FEW", 1)
    iterated = solve()
    monkeypatch.setattr(_rows, "_STEPS", 1)
    followed = solve()
    monkeypatch.setattr(_solvers, "_BLOCK", 5)
    uneven = solve()
    np.testing.assert_allclose(iterated, want, atol=1e-3)
    np.testing.assert_allclose(followed, want, atol=1e-5)
    np.testing.assert_allclose(uneven, want, atol=1e-5)


def test_nan_shows_and_ends():
    got = above(jnp.full((40, 40), jnp.nan), jnp.eye(40), ridge=1e-4)
    assert np.isnan(got).all()


def test_batches_of_quadratics():
    rng = np.random.default_rng(1)
    g = rng.normal(size=(3, 34, 34)) * np.array([1.0, 0.1, 1.0])[:, None, None]
    g[0] = rng.normal(size=(34, 400))[:, :34] + 5 * np.eye(34)
    gram = jnp.asarray(g @ g.transpose(0, 2, 1), jnp.float32)
    gram = gram / jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    gram = gram + 1e-3 * jnp.eye(34)[None]
    batched = jax.vmap(lambda m: above(m, jnp.eye(34), ridge=1e-3))(gram)
    for one, matrix in zip(batched, gram, strict=True):
        alone = above(matrix, jnp.eye(34), ridge=1e-3)
        np.testing.assert_allclose(one, alone, atol=2e-3)


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([2, 3, 30]))
def test_min_norm_point_beats_every_vertex_and_edge(seed, width):
    g = np.random.default_rng(seed).normal(size=(5, width))
    w = np.asarray(nearest(jnp.asarray(g @ g.T, jnp.float32)), float)
    assert w.min() >= 0
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
    d = w @ g
    # Optimal: no gradient lies behind the plane through d.
    assert (g @ d >= d @ d - 1e-4 * np.max(g * g) * width).all()
