"""The mix of two models."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)


def draw(dtype="float32"):
    w = jnp.asarray(RNG.normal(size=(3, 2)), dtype).at[0, 0].set(-0.0)
    return {"w": w, "step": jnp.array(3), "b": jnp.asarray(RNG.normal(size=2), dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ends_are_the_models_bit_for_bit(dtype):
    first, second = draw(dtype), draw(dtype)
    for share, want in ((1, first), (0.0, second)):
        found = merging.mix_weights(first, second, share)
        for name in ("w", "b"):
            assert found[name].dtype == want[name].dtype
            assert found[name].tobytes() == want[name].tobytes()
        assert found["step"] == 3


def test_linear_in_the_share_and_per_leaf():
    first, second = draw(), draw()
    found = merging.mix_weights(first, second, {"w": 0.25, "step": 0, "b": 0.75})
    for name, share in (("w", 0.25), ("b", 0.75)):
        want = share * np.float64(first[name]) + (1 - share) * np.float64(second[name])
        np.testing.assert_allclose(found[name], want, rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    first = draw()
    with pytest.raises(
        ValueError, match="mix_weights: 'b' is in base but not in second"
    ):
        merging.mix_weights(first, {"w": first["w"], "step": first["step"]}, 0.5)
    with pytest.raises(
        ValueError, match="mix_weights: share is neither a scalar nor a tree"
    ):
        merging.mix_weights(first, first, {"w": 0.5})
    with pytest.raises(
        ValueError, match="mix_weights: share is neither a scalar nor a tree"
    ):
        merging.mix_weights(first, first, np.ones(2))
