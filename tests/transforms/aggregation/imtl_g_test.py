import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weigh = jax.jit(aggregation.weights.imtl_g)


def gram_of(grads):
    return jnp.asarray(grads @ grads.T, jnp.float32)


def closed_form(grads):
    """Weights by the paper's differences to the first task, float64."""
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    d, u = grads[0] - grads[1:], units[0] - units[1:]
    rest = grads[0] @ u.T @ np.linalg.inv(d @ u.T)
    return np.concatenate([[1 - rest.sum()], rest])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 5])
def test_is_the_papers_closed_form(seed, count):
    grads = np.random.default_rng(seed).normal(size=(count, 9))
    np.testing.assert_allclose(
        weigh(gram_of(grads)), closed_form(grads), rtol=2e-3, atol=1e-4
    )


def test_lengths_a_million_apart():
    grads = np.random.default_rng(0).normal(size=(3, 9)) * [[1e-6], [1.0], [1e6]]
    found = np.asarray(weigh(gram_of(grads)), np.float64)
    np.testing.assert_allclose(found, closed_form(grads), rtol=2e-3, atol=1e-20)


def test_scaling_a_task_leaves_the_direction_where_gradients_depend():
    grads = np.random.default_rng(1).normal(size=(5, 3))
    scaled = grads * [[1.0], [10.0], [0.1], [3.0], [1.0]]
    one, two = (np.asarray(weigh(gram_of(g))) @ g for g in (grads, scaled))
    np.testing.assert_allclose(
        one / np.linalg.norm(one), two / np.linalg.norm(two), rtol=1e-3, atol=1e-3
    )


def test_no_direction_for_all_is_no_update():
    angles = 2 * np.pi * np.arange(3) / 3
    grads = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert weigh(gram_of(grads)).tolist() == [0, 0, 0]
    assert weigh(jnp.array([[1.0, -1.0], [-1.0, 1.0]])).tolist() == [0, 0]
    assert weigh(jnp.zeros((2, 2))).tolist() == [0, 0]


def test_a_zero_gradient_has_no_say():
    grads = np.random.default_rng(2).normal(size=(3, 9))
    grads[1] = 0
    found = np.asarray(weigh(gram_of(grads)))
    assert found[1] == 0
    np.testing.assert_allclose(found[[0, 2]], closed_form(grads[[0, 2]]), rtol=1e-4)


def test_nan_shows():
    assert np.isnan(weigh(jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]]))).all()
