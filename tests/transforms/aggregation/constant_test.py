import jax.numpy as jnp
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def test_combines_with_the_given_weights():
    tx = aggregation.constant([2.0, -1.0, 0.0])
    grads = {"w": jnp.array([[1.0, 1.0], [0.0, 5.0], [9.0, 9.0]])}
    assert tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist() == [2, -3]


def test_refuses_another_number_of_weights():
    with pytest.raises(
        ValueError, match=r"constant: weights are \(2,\), wanted \(3,\)"
    ):
        aggregation.weights.constant(jnp.eye(3), [1.0, 2.0])
