import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def test_is_a_softmax_of_standard_normals():
    keys = jax.random.split(jax.random.key(0), 4000)
    w = jax.vmap(lambda k: aggregation.weights.random(jnp.eye(3), k))(keys)
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-5)
    ratios = np.log(np.asarray(w[:, 0] / w[:, 1]))
    # The difference of two standard normals; five standard errors of 4000 draws.
    assert abs(ratios.mean()) < 5 * np.sqrt(2 / 4000)
    assert abs(ratios.var() - 2) < 5 * 2 * np.sqrt(2 / 4000)


def test_new_weights_each_step_and_the_same_from_one_seed():
    def weights(seed):
        tx = aggregation.random(seed=seed)
        state = tx.init({"w": jnp.zeros(3)})
        out = []
        for _ in range(3):
            update, state = tx.update({"w": jnp.eye(3)}, state)
            out.append(update["w"].tolist())
        return out

    one, again, other = weights(0), weights(0), weights(1)
    assert one == again
    assert one != other
    assert one[0] != one[1] != one[2]
