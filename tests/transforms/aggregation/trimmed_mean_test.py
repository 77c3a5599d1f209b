import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def update(grads, trim):
    tx = aggregation.trimmed_mean(trim=trim)
    tree = {"w": jnp.asarray(grads)}
    return jax.jit(tx.update)(tree, tx.init({"w": tree["w"][0]}))[0]["w"]


def oracle(grads, trim):
    kept = np.sort(np.asarray(grads, np.float64), 0)[trim : len(grads) - trim]
    return kept.mean(0)


# The last one has more compare-exchanges than are written out.
@pytest.mark.parametrize(
    ("count", "trim"), [(1, 0), (3, 0), (3, 1), (5, 2), (8, 3), (40, 7)]
)
def test_is_the_mean_of_the_sorted_middle(count, trim):
    grads = np.random.default_rng(count).normal(size=(count, 3, 5)).astype(np.float32)
    grads[:, 0, 0] = 1.0  # ties
    np.testing.assert_allclose(
        update(grads, trim), oracle(grads, trim), rtol=1e-5, atol=1e-6
    )


def test_huge_and_infinite_extremes_leave_no_trace():
    grads = np.array([[1e38], [np.inf], [1.0], [2.0], [3.0], [-np.inf], [-1e38]])
    assert update(grads.astype(np.float32), 2).tolist() == [2.0]


@pytest.mark.parametrize(
    ("value", "trim", "want"),
    [(np.nan, 2, False), (np.inf, 1, True), (np.inf, 0, False), (1.0, 1, True)],
)
def test_flag_tells_whether_the_update_is_finite(value, trim, want):
    grads = {"w": jnp.array([[1.0, 2.0]] * 4 + [[value, 3.0]])}
    tx = aggregation.trimmed_mean(trim=trim)
    out, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    assert bool(state.finite) is want
    assert bool(jnp.all(jnp.isfinite(out["w"]))) is want


def test_sums_in_float32():
    grads = np.random.default_rng(0).normal(size=(9, 7)).astype(jnp.bfloat16)
    out = update(grads, 1)
    assert out.dtype == jnp.bfloat16
    want = oracle(grads.astype(np.float32), 1).astype(jnp.bfloat16)
    assert out.tolist() == want.tolist()


def test_sorts_nothing():
    tx = aggregation.trimmed_mean(trim=2)
    grads = {"w": jnp.zeros((9, 16))}
    text = jax.jit(tx.update).lower(grads, tx.init({"w": jnp.zeros(16)})).as_text()
    assert "sort" not in text


def test_refuses_too_few_tasks():
    with pytest.raises(ValueError, match="trimmed_mean: 4 tasks, wanted at least 5"):
        update(np.zeros((4, 2), np.float32), 2)
    with pytest.raises(ValueError, match="trimmed_mean: trim is -1"):
        aggregation.trimmed_mean(trim=-1)
