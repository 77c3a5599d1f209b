import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation
from mtl_jax.transforms.aggregation import _pcgrad


def oracle(grads, orders, targets, beta):
    """Algorithm 1 on full vectors, float64 loops; moves `targets` in place."""
    out = np.zeros(grads.shape[1])
    norm = np.linalg.norm
    for i, g in enumerate(grads):
        v = g.copy()
        for j in orders[i]:
            if j == i:
                continue
            p = v @ grads[j] / (norm(v) * norm(grads[j]))
            t = targets[i, j]
            if p < t:
                rise = t * np.sqrt(1 - p * p) - p * np.sqrt(1 - t * t)
                v += norm(v) * rise / (norm(grads[j]) * np.sqrt(1 - t * t)) * grads[j]
            targets[i, j] = (1 - beta) * t + beta * p
        out += v
    return out


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 0.5]))
def test_matches_algorithm_1_over_steps(seed, beta):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=20)
    tx = aggregation.grad_vac(4, beta=beta, seed=seed % 1000)
    state = tx.init({"w": jnp.zeros(20)})
    update = jax.jit(tx.update)
    targets = np.zeros((4, 4))
    for _ in range(3):
        g = rng.normal(size=(4, 20)) + shared
        use = jax.random.split(state.method.key)[1]
        orders = np.asarray(_pcgrad.random_orders(use, 4))
        got, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        want = oracle(g, orders, targets, beta)
        np.testing.assert_allclose(got["w"], want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(state.method.targets, targets, atol=1e-4)


def test_without_targets_it_is_pcgrad():
    g = np.random.default_rng(0).normal(size=(6, 4))
    gram, key = jnp.asarray(g @ g.T, jnp.float32), jax.random.key(1)
    np.testing.assert_allclose(
        aggregation.weights.grad_vac(gram, key),
        aggregation.weights.pcgrad(gram, key),
        rtol=1e-3,
    )


def test_reaches_the_target():
    """Two tasks, one visit each: the pushed gradient has the wanted cosine."""
    g = np.array([[1.0, 0.2, 0.0], [-0.3, 1.0, 0.5]])
    goal = 0.7
    gram = jnp.asarray(g @ g.T, jnp.float32)
    w = aggregation.weights.grad_vac(gram, jax.random.key(0), jnp.full((2, 2), goal))
    pushed = g[0] + (float(w[1]) - 1) * g[1]
    cosine = pushed @ g[1] / np.linalg.norm(pushed) / np.linalg.norm(g[1])
    np.testing.assert_allclose(cosine, goal, rtol=1e-5)


def test_equal_gradients_stay_finite_as_targets_reach_one():
    tx = aggregation.grad_vac(2, beta=1.0)
    state = tx.init({"w": jnp.zeros(3)})
    for turn in range(4):
        second = jnp.array([1.0, 2.0, 3.0 + 1e-3 * turn])
        grads = {"w": jnp.stack([jnp.array([1.0, 2.0, 3.0]), second])}
        updates, state = tx.update(grads, state)
        assert jnp.abs(updates["w"]).max() < 1e3


def test_names_what_does_not_fit():
    with pytest.raises(ValueError, match="grad_vac: beta is 2"):
        aggregation.grad_vac(2, beta=2)
    with pytest.raises(ValueError, match=r"grad_vac: targets are \(3, 3\)"):
        aggregation.weights.grad_vac(jnp.eye(2), jax.random.key(0), jnp.eye(3))
    tx = aggregation.grad_vac(3)
    with pytest.raises(ValueError, match="grad_vac: there are 2 tasks, wanted 3"):
        tx.update({"w": jnp.eye(2)}, tx.init({"w": jnp.zeros(2)}))


@pytest.mark.parametrize("seed", range(4))
def test_a_zero_gradient_is_not_there(seed):
    g = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    g[1] = 0
    targets = jnp.full((3, 3), 0.6)
    key = jax.random.key(seed)
    found = aggregation.weights.grad_vac(jnp.asarray(g @ g.T), key, targets)
    g = g[[0, 2]]
    want = aggregation.weights.grad_vac(jnp.asarray(g @ g.T), key, targets[:2, :2])
    np.testing.assert_allclose(found[jnp.array([0, 2])], want, rtol=1e-5)


def test_an_absent_task_moves_no_target():
    tx = aggregation.grad_vac(3)
    g = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    _, state = tx.update({"w": jnp.asarray(g)}, tx.init({"w": jnp.zeros(6)}))
    before = state.method.targets
    g[1] = 0
    _, state = tx.update({"w": jnp.asarray(g)}, state)
    after = state.method.targets
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[:, 1], before[:, 1])
    assert after[0, 2] != before[0, 2]


def test_per_leaf_every_leaf_has_its_own_targets():
    g = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    tree = {"a": jnp.asarray(g[:, :2]), "b": jnp.asarray(g[:, 2:])}
    both = aggregation.per_leaf(aggregation.grad_vac(3))
    state = both.init(jax.tree.map(lambda x: x[0], tree))
    for _ in range(2):
        out, state = both.update(tree, state)
    assert state.method.targets.shape == (2, 3, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    for i, (name, leaf) in enumerate(tree.items()):
        alone = aggregation.grad_vac(3)
        own = alone.init({"w": leaf[0]})
        own = own._replace(method=own.method._replace(key=keys[i]))
        for _ in range(2):
            want, own = alone.update({"w": leaf}, own)
        np.testing.assert_allclose(out[name], want["w"], rtol=1e-5, atol=1e-6)
        targets = state.method.targets[i]
        np.testing.assert_allclose(targets, own.method.targets, rtol=1e-5, atol=1e-6)
