import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

free = jax.jit(lambda gram: aggregation.weights.nash_mtl(gram, max_norm=0))


def grads_of(seed, count=3, width=8):
    return np.random.default_rng(seed).normal(size=(count, width))


def run(tx, jacobians):
    """Updates, one per Jacobian."""
    state = tx.init({"w": jnp.zeros(jacobians[0].shape[1])})
    step, out = jax.jit(tx.update), []
    for grads in jacobians:
        update, state = step({"w": jnp.asarray(grads, jnp.float32)}, state)
        out.append(np.asarray(update["w"], np.float64))
    return out, state


@pytest.mark.parametrize("count", [1, 2, 6])
def test_solves_the_bargaining_equations(count):
    for scale in (1e-12, 1.0, 1e12):
        grads = grads_of(count, count, 12) * scale
        gram = grads @ grads.T
        w = np.asarray(free(jnp.asarray(gram, jnp.float32)), np.float64)
        np.testing.assert_allclose(gram @ w * w, 1, rtol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(w @ grads), count**0.5, rtol=1e-3)


def test_scaling_a_task_changes_only_its_weight():
    grads = grads_of(0)
    scaled = grads * [[1.0], [1e4], [1e-4]]
    one, two = (
        np.asarray(free(jnp.asarray(g @ g.T, jnp.float32))) @ g for g in (grads, scaled)
    )
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_bounds_the_update():
    grads = grads_of(1)
    (long,), _ = run(aggregation.nash_mtl(3, max_norm=0.5), [grads])
    want = np.asarray(free(jnp.asarray(grads @ grads.T, jnp.float32))) @ grads
    np.testing.assert_allclose(np.linalg.norm(long), 0.5, rtol=1e-5)
    np.testing.assert_allclose(long, 0.5 * want / np.linalg.norm(want), rtol=1e-4)
    (short,), _ = run(aggregation.nash_mtl(3, max_norm=1e6), [grads])
    np.testing.assert_allclose(short, want, rtol=1e-4)


def test_where_it_starts_does_not_matter():
    jacobians = [grads_of(s) for s in range(3)]
    warm, _ = run(aggregation.nash_mtl(3), jacobians)
    for grads, out in zip(jacobians, warm, strict=True):
        cold = np.asarray(free(jnp.asarray(grads @ grads.T, jnp.float32))) @ grads
        cold /= np.linalg.norm(cold)
        np.testing.assert_allclose(out, cold, rtol=1e-3, atol=1e-4)


def test_keeps_weights_in_between():
    jacobians = [grads_of(s) for s in range(3)]
    out, state = run(aggregation.nash_mtl(3, every=2, max_norm=0), jacobians)
    gram = jnp.asarray(jacobians[0] @ jacobians[0].T, jnp.float32)
    first = np.asarray(free(gram))
    np.testing.assert_allclose(out[1], first @ jacobians[1], rtol=1e-3, atol=1e-4)
    gram = jnp.asarray(jacobians[2] @ jacobians[2].T, jnp.float32)
    third = np.asarray(free(gram)) @ jacobians[2]
    np.testing.assert_allclose(out[2], third, rtol=1e-3, atol=1e-4)
    assert int(state.method.step) == 3


def test_nan_is_shown_and_not_kept():
    bad = np.full((3, 8), np.nan)
    (first, second), state = run(aggregation.nash_mtl(3), [bad, grads_of(0)])
    assert np.isnan(first).all()
    assert np.isfinite(second).all()
    assert np.isfinite(state.method.shares).all()


def test_refuses_other_numbers_of_tasks():
    tx = aggregation.nash_mtl(4)
    with pytest.raises(
        ValueError, match=r"nash_mtl: gram is \(3, 3\), wanted \[4, 4\]"
    ):
        tx.rule.weigh(jnp.eye(3), tx.rule.init())
    with pytest.raises(ValueError, match="nash_mtl: every is 0"):
        aggregation.nash_mtl(4, every=0)
