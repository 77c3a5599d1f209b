import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import RelativeBias, distance_buckets

pytestmark = pytest.mark.fast


def test_buckets_are_single_and_then_widen():
    table = distance_buckets(16, 128)
    np.testing.assert_array_equal(table[:8], np.arange(8))
    assert table[-1] == 15
    # Each of the other half is 16^(1/8) = sqrt(2) times as far as the one before.
    for n in range(8, 16):
        first = int(np.argmax(table == n))
        assert first == np.ceil(8 * 2 ** ((n - 8) / 2) - 1e-9)
    for buckets, farthest in ((1, 8), (8, 4)):
        with pytest.raises(ValueError, match="max_distance must exceed half of them"):
            distance_buckets(buckets, farthest)


@pytest.mark.parametrize("both", [False, True])
def test_the_bias_is_looked_up_by_distance(both):
    layer = RelativeBias(2, 8, 6, both)
    query, key = jnp.array([[4, 0, 9]]), jnp.array([[0, 3, 4, 5, 20]])
    params = layer.init(jax.random.key(0), query, key)
    table = np.asarray(params["params"]["embedding"])
    got = layer.apply(params, query, key)
    assert got.shape == (1, 2, 3, 5)
    buckets = distance_buckets(4 if both else 8, 6)
    for i, q in enumerate([4, 0, 9]):
        for j, k in enumerate([0, 3, 4, 5, 20]):
            back = q - k
            far = abs(back) if both else max(back, 0)
            row = buckets[min(far, 6)] + (4 if both and back < 0 else 0)
            np.testing.assert_array_equal(got[0, :, i, j], table[row])
