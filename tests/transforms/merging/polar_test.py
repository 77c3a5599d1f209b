"""Polar factors against singular vectors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms.merging import _polar

polar = jax.jit(_polar.polar, static_argnums=1)


def falling(seed, m, n, last, rank=None):
    """A matrix of singular values from 1 to `last`, then 0, and its polar factor."""
    x = np.random.default_rng(seed).normal(size=(m, n))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = len(s) if rank is None else rank
    u, vt = u[:, :rank], vt[:rank]
    return u * np.geomspace(1, last, rank) @ vt, u @ vt


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("method", "last", "bound"),
    [
        ("svd", 1e-3, 1e-3),
        ("gram", 1e-3, 2e-2),
        ("newton", 1e-3, 2e-2),
        ("gram", 0.2, 1e-3),
        ("newton", 0.2, 1e-3),
    ],
)
@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_polar_factors(method, last, bound, shape):
    x, wanted = falling(2, *shape, last)
    got = np.asarray(polar(jnp.asarray(x, jnp.float32), method))
    assert error(got, wanted) < bound
    scaled = polar(jnp.asarray(1e25 * x, jnp.float32), method)
    assert error(np.asarray(scaled), wanted) < bound


@pytest.mark.parametrize("method", ["svd", "gram", "newton"])
def test_polar_of_low_rank_is_a_partial_isometry(method):
    x, _ = falling(3, 10, 8, 0.5, rank=3)
    u, _, vt = np.linalg.svd(x)
    got = np.asarray(polar(jnp.asarray(x, jnp.float32), method))
    assert error(got, u[:, :3] @ vt[:3]) < 1e-2
    assert not np.asarray(polar(jnp.zeros((2, 4, 3)), method)).any()


def test_newton_brings_every_value_near_one():
    x = np.geomspace(1e-4, 1, 500)
    for a, b, c in _polar._newton_steps(1e-4):
        x = a * x + b * x**3 + c * x**5
    np.testing.assert_allclose(x, 1, atol=1e-6)


def test_a_small_direction_is_brought_to_one():
    x, wanted = falling(5, 64, 64, 1.0)
    u, _, vt = np.linalg.svd(x)
    x += (6e-6 - 1) * np.outer(u[:, -1], vt[-1])
    assert error(np.asarray(polar(jnp.asarray(x, jnp.float32), "svd")), wanted) < 2e-2


def test_gram_of_many_random_columns():
    # The smallest singular value is 4e-4 of the largest.
    x = np.random.default_rng(0).normal(size=(300, 300))
    u, _, vt = np.linalg.svd(x)
    got = np.asarray(polar(jnp.asarray(x, jnp.float32), "gram"))
    assert error(got, u @ vt) < 5e-4


@pytest.mark.parametrize("rank", [1, 32, 64])
def test_gram_of_equal_values_and_many_zeros(rank):
    # Of rank 64 the first Gramian has no Cholesky factor but for its lift.
    x, wanted = falling(7, 512, 512, 1.0, rank=rank)
    got = np.asarray(polar(jnp.asarray(x, jnp.float32), "gram"))
    assert error(got, wanted) < 2e-2
