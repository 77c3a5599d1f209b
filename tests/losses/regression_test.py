import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses

pytestmark = pytest.mark.fast

PREDICTIONS = np.array([[0.0, 1.5], [-2.0, 4.0]])
TARGETS = np.array([[0.5, 1.5], [1.0, -4.0]])
DIFFERENCE = np.array([[0.5, 0.0], [3.0, 8.0]])


@pytest.mark.parametrize(
    ("f", "want"),
    [
        (losses.squared_error, DIFFERENCE**2),
        (losses.absolute_error, DIFFERENCE),
        (losses.huber, [[0.125, 0.0], [2.5, 7.5]]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_per_element_in_float32(f, want, dtype):
    got = f(jnp.asarray(PREDICTIONS, dtype), jnp.asarray(TARGETS, dtype))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.asarray(want))


def test_huber_is_smooth_where_its_pieces_meet():
    slope = jax.vmap(jax.grad(lambda d: losses.huber(d, jnp.zeros(()), 2.0)))
    np.testing.assert_allclose(
        slope(jnp.array([1.999, 2.001, -2.001])), [1.999, 2, -2], rtol=1e-6
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"squared_error: predictions are \(2,\)"):
        losses.squared_error(jnp.zeros(2), jnp.zeros(()))
    with pytest.raises(ValueError, match="huber: delta"):
        losses.huber(jnp.zeros(2), jnp.zeros(2), 0.0)
