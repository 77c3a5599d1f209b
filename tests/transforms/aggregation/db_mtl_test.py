import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_follows_the_algorithm_over_steps(power):
    rng = np.random.default_rng(0)
    tx = aggregation.db_mtl(3, beta=0.8, beta_power=power)
    state, y = tx.init({"w": jnp.zeros(7)}), np.zeros((3, 7))
    update = jax.jit(tx.update)
    for k in range(1, 4):
        grads = rng.normal(size=(3, 7)) * [[1.0], [30.0], [0.1]]
        losses = rng.uniform(0.5, 2, 3)
        log_grads = grads / losses[:, None]
        y = log_grads + 0.8 / k**power * (y - log_grads)
        norms = np.linalg.norm(y, axis=1)
        want = (norms.max() / norms) @ y
        tree = {"w": jnp.asarray(grads, jnp.float32)}
        out, state = update(tree, state, losses=jnp.asarray(losses, jnp.float32))
        np.testing.assert_allclose(out["w"], want, rtol=1e-4, atol=1e-4)


def test_a_rescaled_loss_changes_nothing():
    rng = np.random.default_rng(1)
    grads, losses = rng.normal(size=(2, 5)), np.array([1.0, 2.0])
    outs = []
    for scale in (1.0, 1e4):
        factor = np.array([1.0, scale])
        tx = aggregation.db_mtl(2)
        tree = {"w": jnp.asarray(grads * factor[:, None], jnp.float32)}
        extra = {"losses": jnp.asarray(losses * factor, jnp.float32)}
        outs.append(tx.update(tree, tx.init({"w": jnp.zeros(5)}), **extra)[0]["w"])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4)


def test_a_zero_loss_with_a_zero_gradient_adds_nothing():
    tx = aggregation.db_mtl(2)
    grads = {"w": jnp.array([[0.0, 0.0], [1.0, 2.0]])}
    losses = jnp.array([0.0, 1.0])
    out, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}), losses=losses)
    np.testing.assert_allclose(out["w"], [0.1, 0.2], rtol=1e-5)


def test_negative_losses_are_refused_or_shown():
    tx = aggregation.db_mtl(2)
    grads, losses = {"w": jnp.eye(2)}, jnp.array([1.0, -1.0])
    state = tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"db_mtl: losses are \[1.0, -1.0\], wanted 0"):
        tx.update(grads, state, losses=losses)
    out, _ = jax.jit(tx.update)(grads, state, losses=losses)
    assert np.isnan(out["w"]).all()
    with pytest.raises(ValueError, match="db_mtl: needs losses"):
        tx.update(grads, state)
