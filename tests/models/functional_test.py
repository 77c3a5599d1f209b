import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

pytestmark = pytest.mark.fast


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if train and not self.is_initializing():
            mean.value = x.mean(0)
        w = self.param("w", nn.initializers.ones, x.shape[-1:])
        return (x - mean.value[None]) * w[None]

    def double(self, x):
        return 2 * self(x)


X = jnp.array([[1.0, 2.0], [3.0, 5.0]])


def test_other_collections_are_closed_over_and_frozen():
    module = WithStatistics()
    variables = module.init(jax.random.key(0), X)
    variables = {**variables, "batch_stats": {"mean": jnp.array([1.0, 1.0])}}
    apply_fn, params = models.functional(module, variables)
    assert set(params) == {"w"}
    np.testing.assert_array_equal(apply_fn(params, X), X - 1)
    grad = jax.grad(lambda p: apply_fn(p, X).sum())(params)
    np.testing.assert_array_equal(grad["w"], [2, 5])
    with pytest.raises(Exception, match="immutable"):
        apply_fn(params, X, train=True)


def test_method_and_call_options():
    module = WithStatistics()
    variables = module.init(jax.random.key(0), X)
    apply_fn, params = models.functional(module, variables, method="double")
    np.testing.assert_array_equal(apply_fn(params, X), 2 * X)
    bert = models.Bert(vocab_size=5, width=4, depth=1, num_heads=1, mlp_dim=4)
    ids = jnp.zeros((1, 3), jnp.int32)
    variables = jax.eval_shape(bert.init, jax.random.key(0), ids)
    apply_fn, params = models.functional(bert, variables, return_hidden=True)
    assert len(jax.eval_shape(apply_fn, params, ids)) == 2
    last = jax.eval_shape(lambda p: apply_fn(p, ids, return_hidden=False), params)
    assert last.shape == (1, 3, 4)


def test_variables_without_params_are_refused():
    with pytest.raises(ValueError, match="functional: wanted a 'params' collection"):
        models.functional(WithStatistics(), {"batch_stats": {}})
