import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def simplex(v):
    order = np.sort(v)[::-1]
    level = (np.cumsum(order) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - level.max(), 0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projection", ["softmax", "simplex"])
def test_follows_the_algorithm_over_steps(normalize, projection):
    rng = np.random.default_rng(0)
    options = {"beta": 0.6, "beta_power": 0.5, "gamma": 0.2, "gamma_power": 0.3}
    tx = aggregation.moco(
        3, normalize=normalize, projection=projection, rho=0.1, **options
    )
    state = tx.init({"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)})
    y, w = np.zeros((3, 7)), np.full(3, 1 / 3)
    update = jax.jit(tx.update)
    for k in range(1, 4):
        grads, losses = rng.normal(size=(3, 7)), rng.uniform(0.5, 2, 3)
        target = grads.copy()
        if normalize:
            target *= (losses / np.linalg.norm(grads, axis=1))[:, None]
        y = y - 0.6 / k**0.5 * (y - target)
        moved = w - 0.2 / k**0.3 * (y @ y.T + 0.1 * np.eye(3)) @ w
        w = softmax(moved) if projection == "softmax" else simplex(moved)
        tree = {"a": grads[:, :4].reshape(3, 2, 2), "b": grads[:, 4:]}
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        out, state = update(tree, state, losses=jnp.asarray(losses, jnp.float32))
        flat = np.concatenate([np.ravel(out["a"]), out["b"]])
        np.testing.assert_allclose(state.method.weights, w, rtol=1e-4)
        np.testing.assert_allclose(flat, w @ y, rtol=1e-4, atol=1e-5)


def test_a_zero_gradient_stays_zero():
    tx = aggregation.moco(2)
    grads = {"w": jnp.array([[0.0, 0.0], [1.0, 1.0]])}
    _, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}), losses=jnp.ones(2))
    assert state.method.tracked["w"][0].tolist() == [0, 0]


def test_refusals():
    tx = aggregation.moco(2)
    state = tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="moco: needs losses"):
        tx.update({"w": jnp.eye(2)}, state)
    with pytest.raises(ValueError, match=r"moco: losses are \[1.0, -1.0\]"):
        tx.update({"w": jnp.eye(2)}, state, losses=jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="moco: 3 tasks, wanted num_tasks = 2"):
        tx.update({"w": jnp.ones((3, 2))}, state, losses=jnp.ones(3))
    with pytest.raises(ValueError, match="moco: projection is 'none'"):
        aggregation.moco(2, projection="none")
