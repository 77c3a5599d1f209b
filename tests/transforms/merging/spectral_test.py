"""Singular vectors and the matrices of a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms.merging import _spectral


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def falling(seed, m, n, last):
    """A matrix whose singular values fall from 1 to `last`."""
    u, _, vt = np.linalg.svd(draw(seed, m, n), full_matrices=False)
    return u * np.geomspace(1, last, min(m, n)) @ vt


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


svd = jax.jit(_spectral.svd, static_argnums=(1, 2))


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_triplets_rebuild_and_match(method, shape):
    x = np.stack([falling(i, *shape, 0.1) for i in range(2)])
    u, s, vt = map(np.asarray, svd(jnp.asarray(x, jnp.float32), None, method))
    np.testing.assert_allclose(u * s[:, None] @ vt, x, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), atol=1e-5)
    for side in (u.swapaxes(1, 2) @ u, vt @ vt.swapaxes(1, 2)):
        np.testing.assert_allclose(side, np.stack([np.eye(5)] * 2), atol=1e-3)
    short = svd(jnp.asarray(x, jnp.float32), 2, method)
    np.testing.assert_allclose(short[1], s[:, :2], rtol=1e-5)
    assert short[0].shape == (2, shape[0], 2) and short[2].shape == (2, 2, shape[1])


def test_a_gram_loses_the_vectors_of_small_values_and_no_more():
    x = jnp.asarray(falling(0, 24, 24, 1e-6), jnp.float32)
    u, s, vt = map(np.asarray, svd(x, None, "gram"))
    np.testing.assert_allclose(u * s @ vt, x, atol=1e-5)
    large = np.geomspace(1, 1e-6, 24) > 3e-2
    near = (vt @ vt.T)[large][:, large]
    np.testing.assert_allclose(near, np.eye(large.sum()), atol=2e-2)


@pytest.mark.parametrize("shape", [(160, 130), (130, 160)])
@pytest.mark.parametrize("rank", [8, 12])
def test_a_sketch_finds_the_leading_part(shape, rank):
    x = falling(1, *shape, 1e-5)
    u, s, vt = map(np.asarray, svd(jnp.asarray(x, jnp.float32), rank, "sketch"))
    left, values, right = np.linalg.svd(x, full_matrices=False)
    assert error(u * s @ vt, left[:, :rank] * values[:rank] @ right[:rank]) < 1e-3
    for side in (u.T @ u, vt @ vt.T):
        np.testing.assert_allclose(side, np.eye(rank), atol=1e-4)


def test_a_sketch_beats_the_last_step_alone_where_values_hardly_fall():
    u, _, vt = np.linalg.svd(draw(1, 200, 200))
    values = np.arange(1, 201) ** -0.4
    found = svd(jnp.asarray(u * values @ vt, jnp.float32), 20, "sketch")
    # The last of four steps of as many products, of 34 vectors each, has 0.017 less.
    np.testing.assert_allclose(found[1], values[:20], rtol=1e-4)


@pytest.mark.parametrize("count", [20, 30, 130])
def test_a_sketch_of_equal_values(count):
    # Little and far more of them than the 16 vectors of a block.
    u, _, vt = np.linalg.svd(draw(2, 130, 130))
    x = np.stack([u[:, :count] @ vt[:count], np.zeros((130, 130))])
    found = svd(jnp.asarray(x, jnp.float32), 16, "sketch")
    u, s, vt = map(np.asarray, found)
    np.testing.assert_allclose(s, np.stack([np.ones(16), np.zeros(16)]), atol=5e-4)
    np.testing.assert_allclose(u[0].T @ u[0], np.eye(16), atol=5e-4)
    np.testing.assert_allclose(x[0] @ vt[0].T, u[0], atol=1e-4)
    assert not u[1].any() and not vt[1].any()


def test_random_directions_of_a_sketch_are_not_shared():
    x = draw(3, 2, 700, 4) @ draw(4, 2, 4, 700)
    q = _spectral._krylov(jnp.asarray(x, jnp.float32), 20)[0]
    cosines = np.linalg.svd(q[0] @ q[1].T, compute_uv=False)
    assert q.shape == (2, 160, 700) and cosines[0] < 0.97


def test_a_sketch_of_less_than_a_block():
    x = draw(3, 130, 3) @ draw(4, 3, 130)
    u, s, vt = map(np.asarray, svd(jnp.asarray(x, jnp.float32), 8, "sketch"))
    assert error(u * s @ vt, x) < 1e-4
    assert (s > 0).sum() == 3


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_directions_that_are_not_there_are_zeros(method):
    x = np.zeros((2, 6, 4))
    x[0, 0, 0] = 3.0
    u, s, vt = map(np.asarray, svd(jnp.asarray(x, jnp.float32), None, method))
    np.testing.assert_allclose(s, [[3, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
    assert not u[:, :, 1:].any() and not vt[:, 1:].any() and not u[1].any()


@pytest.mark.parametrize("rank", [1, 8, 100])
def test_orthonormal_rows_of_low_rank_are_finite(rank):
    x = draw(6, 400, rank) @ draw(7, rank, 500)
    rows = np.asarray(_spectral.orthonormal_rows(jnp.asarray(x, jnp.float32)))
    values = np.linalg.svd(rows, compute_uv=False)
    assert values[0] < 1.01 and values[int(0.9 * (rank - 1))] > 0.99


@pytest.mark.parametrize("side", [256, 257, 700])
def test_inverse_factors_in_halves(side):
    x = draw(0, 2, side, side)
    gram = x @ x.swapaxes(1, 2) + side * np.eye(side)
    found = jax.jit(_spectral.inverse_factor)(jnp.asarray(gram, jnp.float32))
    wanted = np.linalg.inv(np.linalg.cholesky(gram))
    assert error(np.asarray(found), wanted) < 1e-5
    assert not np.triu(found, 1).any()


def test_views_by_shape_rule_and_kind():
    taus = {
        "bias": jnp.zeros((2, 3)),
        "conv": jnp.zeros((2, 2, 2, 3, 5)),
        "ids": jnp.zeros((2, 3, 4), jnp.int32),
        "none": jnp.zeros((2, 0, 4)),
        "w": jnp.zeros((2, 3, 4)),
    }
    assert _spectral.views("f", taus, None) == {"w": (0, 1)}
    every = _spectral.views("f", taus, lambda _, shape: len(shape) > 1)
    assert every == {"w": (0, 1), "conv": (2, 1)}
    flat = _spectral.views(
        "f", taus, lambda name, _: (0, 3) if name == "conv" else None
    )
    assert flat == {"conv": (0, 3)}
    x = jnp.asarray(draw(5, 2, 2, 2, 3, 5), jnp.float32)
    seen = _spectral.to_matrices(x, flat["conv"], "in_out")
    assert seen.shape == (2, 1, 5, 12)
    back = _spectral.from_matrices(seen[0], x, "in_out")
    np.testing.assert_array_equal(back, x[0])
    with pytest.raises(
        ValueError, match=r"f: matrices gives True for 'bias' of \(3,\)"
    ):
        _spectral.views("f", taus, lambda name, _: name == "bias")


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("side", [32, 64, 400])
def test_rounding_is_not_a_direction(side, method):
    rank = side // 2 if method == "gram" and side == 32 else 3 * side // 4
    x = draw(0, 5, side, rank) @ draw(1, 5, rank, side)
    found = svd(jnp.asarray(x, jnp.float32), None, method)[1]
    assert ((found > 0).sum(-1) == rank).all()


@pytest.mark.parametrize("side", [64, 400])
def test_small_directions_are_there(side):
    u, _, vt = np.linalg.svd(draw(5, side, side))
    values = np.ones(side)
    values[-1] = 6e-6
    full = jnp.asarray(u * values @ vt, jnp.float32)
    assert (svd(full, None, "svd")[1] > 0).all()


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("method", ["svd", "gram", "sketch"])
def test_sizes_of_which_no_square_exists(size, method):
    x = falling(0, 130, 130, 1e-3)
    u, s, vt = svd(jnp.asarray(size * x, jnp.float32), 8, method)
    want = svd(jnp.asarray(x, jnp.float32), 8, method)
    np.testing.assert_allclose(s / size, want[1], rtol=1e-4)
    np.testing.assert_allclose(abs(u * want[0]).sum(0), 1, rtol=1e-3)
    np.testing.assert_allclose(abs(vt * want[2]).sum(1), 1, rtol=1e-3)


def test_a_sketch_of_few_large_values():
    u, _, vt = np.linalg.svd(draw(0, 400, 400))
    values = np.full(400, 1e-2)
    values[:5] = 1
    found = svd(jnp.asarray(u * values @ vt, jnp.float32), 100, "sketch")
    u, s, _ = map(np.asarray, found)
    np.testing.assert_allclose(u.T @ u, np.eye(100), atol=1e-3)
    np.testing.assert_allclose(s, values[:100], rtol=1e-3)
