import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation
from mtl_jax.transforms.aggregation import _pcgrad


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


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 5]))
def test_matches_algorithm_1(seed, count):
    g = np.random.default_rng(seed).normal(size=(count, 4))
    key = jax.random.key(seed)
    orders = np.asarray(_pcgrad.random_orders(key, count))
    w = aggregation.weights.pcgrad(jnp.asarray(g @ g.T, jnp.float32), key)
    np.testing.assert_allclose(
        np.asarray(w, float) @ g, oracle(g, orders), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 100])
def test_orders_are_permutations(count):
    orders = np.asarray(_pcgrad.random_orders(jax.random.key(count), count))
    np.testing.assert_array_equal(
        np.sort(orders, 1), np.broadcast_to(np.arange(count), (count, count))
    )


def test_every_order_is_as_likely():
    keys = jax.random.split(jax.random.key(0), 2000)
    orders = np.asarray(jax.vmap(lambda k: _pcgrad.random_orders(k, 3))(keys))
    codes = (orders.reshape(-1, 3) * np.array([9, 3, 1])).sum(1)
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 6
    # 1000 expected of each, standard deviation 29.
    assert np.abs(counts - 1000).max() < 150


def test_draws_new_orders_each_step():
    g = np.random.default_rng(1).normal(size=(6, 3))
    tx = aggregation.pcgrad()
    grads = {"w": jnp.asarray(g, jnp.float32)}
    first, state = tx.update(grads, tx.init({"w": jnp.zeros(3)}))
    second, _ = tx.update(grads, state)
    assert not np.allclose(first["w"], second["w"], rtol=1e-3)


def test_heads_an_optax_chain():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(0), (4, *p.shape)), params
    )
    tx = optax.chain(aggregation.pcgrad(), optax.sgd(1e-3))
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
