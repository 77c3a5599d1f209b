import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

LEVELS = {
    "min": np.min,
    "median": lambda x: np.sort(x)[(len(x) - 1) // 2],
    "mean": np.mean,
}


@pytest.mark.parametrize("scale", LEVELS)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_aligned_gradients_are_orthogonal_and_equally_long(scale, count):
    grads = np.random.default_rng(count).normal(size=(count, 12))
    gram = grads @ grads.T
    rows = jax.vmap(
        lambda p: aggregation.weights.aligned_mtl(
            jnp.asarray(gram, jnp.float32), p, scale=scale
        )
    )(jnp.eye(count))
    aligned = np.asarray(rows, np.float64) @ grads
    level = LEVELS[scale](np.linalg.eigvalsh(gram))
    np.testing.assert_allclose(
        aligned @ aligned.T, level * np.eye(count), atol=1e-3 * level
    )


@pytest.mark.parametrize("scale", LEVELS)
def test_dependent_gradients_keep_their_rank(scale):
    grads = np.random.default_rng(0).normal(size=(6, 3))
    values, vectors = np.linalg.eigh(grads @ grads.T)
    values, vectors = values[3:], vectors[:, 3:]
    root = np.sqrt(LEVELS[scale](values) / values)
    want = (vectors * root) @ vectors.T @ np.full(6, 1 / 6)
    found = aggregation.weights.aligned_mtl(
        jnp.asarray(grads @ grads.T, jnp.float32), scale=scale
    )
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_scales_out():
    gram = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    one, two = (aggregation.weights.aligned_mtl(gram * s) for s in (1e-30, 1e30))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_no_gradients_are_combined_as_preferred():
    wanted = [0.25, 0.75]
    found = aggregation.weights.aligned_mtl(jnp.zeros((2, 2)), wanted)
    assert found.tolist() == wanted


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="aligned_mtl: scale is 'max', wanted one of"):
        aggregation.aligned_mtl(scale="max")
