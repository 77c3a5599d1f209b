import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


def test_starts_uniform_and_answers_in_float32():
    x = jax.random.normal(jax.random.key(0), (2, 4)).astype(jnp.bfloat16)
    head = models.Classifier(3, dtype=jnp.bfloat16)
    variables = head.init(jax.random.key(1), x)
    logits = head.apply(variables, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, np.zeros((2, 3)))
    kernel = variables["params"]["classifier"]["kernel"]
    assert kernel.shape == (4, 3)
    assert kernel.dtype == jnp.float32
