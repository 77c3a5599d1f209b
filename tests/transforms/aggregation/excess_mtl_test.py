import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation
from mtl_jax.transforms.aggregation import _excess_mtl

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("warmup", [1, 2])
def test_follows_the_algorithm_over_steps(warmup):
    rng = np.random.default_rng(0)
    tx = aggregation.excess_mtl(3, step_size=0.5, warmup=warmup)
    state = tx.init({"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)})
    squares, w, first = np.zeros((3, 7)), np.full(3, 1 / 3), []
    update = jax.jit(tx.update)
    for k in range(5):
        grads = rng.normal(size=(3, 7)) * [[1.0], [3.0], [0.1 * (k + 1)]]
        squares += grads**2
        excess = (grads**2 / np.sqrt(squares + 1e-7)).sum(1)
        if k < warmup:
            first.append(excess)
        else:
            w = w * np.exp(0.5 * excess / (np.mean(first, 0) + 1e-7))
            w /= w.sum()
        tree = {"a": grads[:, :4].reshape(3, 2, 2), "b": grads[:, 4:]}
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        out, state = update(tree, state)
        flat = np.concatenate([np.ravel(out["a"]), out["b"]])
        np.testing.assert_allclose(flat, w @ grads, rtol=1e-3, atol=1e-4)


def test_weights_stay_finite_for_large_steps():
    tx = aggregation.excess_mtl(2, step_size=1e4)
    grads = {"w": jnp.array([[1.0, 1.0], [1e-3, 0.0]])}
    state = tx.init({"w": jnp.zeros(2)})
    for _ in range(3):
        out, state = tx.update(grads, state)
        assert np.isfinite(out["w"]).all()


def test_a_task_without_gradients_is_finite():
    tx = aggregation.excess_mtl(2)
    grads = {"w": jnp.array([[1.0, 1.0], [0.0, 0.0]])}
    state = tx.init({"w": jnp.zeros(2)})
    for _ in range(2):
        out, state = tx.update(grads, state)
    assert np.isfinite(out["w"]).all()


def test_a_task_that_comes_later_warms_up_by_itself():
    tx = aggregation.excess_mtl(2, step_size=0.5)
    late = jnp.array([[0.0, 0.0], [0.0, 1.0]])
    state = tx.init({"w": jnp.zeros(2)})
    for grads in (late, late, jnp.eye(2), jnp.eye(2)):
        out, state = tx.update({"w": grads}, state)
        assert 0.2 < out["w"][1] < 0.8
    # Its third step, on squares of three; and the second of the other, on two.
    second = 0.5 * (1 / np.sqrt(2) + 1 / np.sqrt(3) + 1 / np.sqrt(4))
    first = 0.5 * (1 / np.sqrt(2))
    want = np.exp(first) / (np.exp(first) + np.exp(second))
    np.testing.assert_allclose(out["w"][0], want, rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="excess_mtl: warmup is 0, wanted 1 or more"):
        aggregation.excess_mtl(2, warmup=0)
    tx = aggregation.excess_mtl(2)
    with pytest.raises(ValueError, match="excess_mtl: 3 tasks, wanted num_tasks = 2"):
        tx.update({"w": jnp.ones((3, 2))}, tx.init({"w": jnp.zeros(2)}))


@pytest.mark.parametrize("shape", [(3, 8192), (3, 2, 8192), (2, 20_000)])
def test_by_slices_is_the_same(shape):
    rng = np.random.default_rng(0)
    squares = jnp.asarray(rng.uniform(0, 2, size=shape), jnp.float32)
    grads = jnp.asarray(rng.normal(size=shape), jnp.float32)
    want, found = (
        jax.jit(f)(squares, grads)
        for f in (_excess_mtl._advance, _excess_mtl._advance_blocked)
    )
    for one, two in zip(want, found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
