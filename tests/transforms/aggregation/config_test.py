import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation


def oracle(grads, preference=None):
    """Equation 2 on full vectors, float64."""
    preference = np.ones(len(grads)) if preference is None else preference
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    best = np.linalg.pinv(units) @ preference
    direction = best / np.linalg.norm(best)
    return (grads @ direction).sum() * direction


def update(grads, preference=None):
    tx = aggregation.config(preference=preference)
    tree = {"w": jnp.asarray(grads, jnp.float32)}
    return tx.update(tree, tx.init({"w": tree["w"][0]}))[0]["w"]


@pytest.mark.parametrize("shape", [(1, 4), (2, 9), (5, 9), (6, 4)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_is_equation_2(shape, scale):
    grads = np.random.default_rng(sum(shape)).normal(size=shape) * scale
    want = oracle(grads)
    bound = 2e-3 * np.abs(want).max()
    np.testing.assert_allclose(update(grads), want, rtol=0, atol=bound)


def test_preference_sets_the_cosines():
    grads = np.random.default_rng(0).normal(size=(3, 20)) * [[1.0], [50.0], [0.1]]
    wanted = np.array([1.0, 2.0, 3.0])
    out = np.asarray(update(grads, wanted), np.float64)
    cosines = grads @ out / np.linalg.norm(grads, axis=1) / np.linalg.norm(out)
    np.testing.assert_allclose(cosines / cosines[0], wanted, rtol=1e-3)
    np.testing.assert_allclose(out, oracle(grads, wanted), rtol=2e-3, atol=1e-3)


def test_conflicts_with_no_task():
    rng = np.random.default_rng(1)
    weigh = jax.jit(aggregation.weights.config)
    for _ in range(20):
        grads = rng.normal(size=(6, 12)) + 1.5 * rng.normal(size=12)
        grads *= np.sign(rng.normal(size=(6, 1)))
        w = np.asarray(weigh(jnp.asarray(grads @ grads.T, jnp.float32)), np.float64)
        assert (grads @ (w @ grads) > 0).all()


def test_stationary_and_zero_gradients():
    assert update(np.array([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0, 0]
    assert update(np.zeros((2, 2))).tolist() == [0, 0]
    found = update(np.array([[2.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [2.0, 0.0])


def test_refuses_a_preference_of_another_length():
    with pytest.raises(
        ValueError, match=r"config: preference is \(3,\), wanted \(2,\)"
    ):
        aggregation.weights.config(jnp.eye(2), jnp.ones(3))
