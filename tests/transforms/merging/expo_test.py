"""ExPO: parameters beyond the stronger model."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree

pytestmark = pytest.mark.fast


def test_is_the_stronger_model_plus_strength_times_the_step():
    rng = np.random.default_rng(0)
    weak, strong = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    taus = merging.task_vectors({"w": weak}, [{"w": strong}])
    delta = merging.expo(taus, strength=0.3)
    got = tree.add_scaled({"w": jnp.asarray(weak)}, delta)["w"]
    np.testing.assert_allclose(
        got, strong + 0.3 * (strong - weak), rtol=1e-5, atol=1e-6
    )
    same = merging.expo(taus, strength=0.0)["w"]
    np.testing.assert_array_equal(same, taus["w"][0])


def test_several_models_are_averaged_first():
    taus = {"w": jnp.array([[1.0], [3.0]], jnp.bfloat16)}
    assert merging.expo(taus, strength=1.0)["w"].tolist() == [4.0]
    weighted = merging.expo(taus, strength=1.0, weights=[3.0, 1.0])["w"]
    assert weighted.tolist() == [3.0] and weighted.dtype == jnp.bfloat16


@pytest.mark.parametrize("strength", ["x", None, [0.1, 0.2]])
def test_refuses_by_name(strength):
    with pytest.raises(ValueError, match="expo: strength is .*, wanted a number"):
        merging.expo({"w": jnp.ones((2, 3))}, strength=strength)
