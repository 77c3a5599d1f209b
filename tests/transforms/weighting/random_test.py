import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting

pytestmark = pytest.mark.fast


def draw(seed, steps):
    method = weighting.random(seed=seed)
    params, state = method.init(3)
    rows = []
    for _ in range(steps):
        rows.append(method.weights(jnp.ones(3), params, state))
        state = method.update(state, jnp.ones(3))
    return np.stack(rows)


def test_new_positive_weights_every_step():
    weights = draw(0, 4)
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert len(np.unique(weights[:, 0])) == 4


def test_same_seed_same_weights():
    np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
    assert (draw(1, 1) != draw(2, 1)).any()


def test_logits_are_standard_normal():
    method = weighting.random()
    params, state = method.init(4000)
    logs = np.log(method.weights(jnp.ones(4000), params, state))
    assert logs.std() == pytest.approx(1, abs=0.05)
    assert jax.dtypes.issubdtype(state.method.dtype, jax.dtypes.prng_key)
