import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def oracle(grads, orders):
    """Algorithm 1 on full vectors, float64 loops."""
    out = np.zeros(grads.shape[1])
    for i, g in enumerate(grads):
        g = g.copy()
        for j in orders[i]:
            if j != i and g @ grads[j] < 0:
                g -= (g @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
        out += g
    return out


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(2, 6))
def test_matches_algorithm_1(seed, count):
    g = np.random.default_rng(seed).normal(size=(count, 9))
    key = jax.random.key(seed)
    orders = [
        np.asarray(jax.random.permutation(k, count))
        for k in jax.random.split(key, count)
    ]
    w = aggregation.weights.pcgrad(jnp.asarray(g @ g.T, jnp.float32), key)
    np.testing.assert_allclose(
        w @ jnp.asarray(g, jnp.float32), oracle(g, orders), rtol=2e-3, atol=2e-3
    )


def test_heads_an_optax_chain():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(0), (4, *p.shape)), params
    )
    tx = optax.chain(aggregation.pcgrad(), optax.sgd(1e-3))
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
