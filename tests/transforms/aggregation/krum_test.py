import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def oracle(grads, faulty, selected, power):
    """Scores by loops over full vectors, float64."""
    count = len(grads)
    scores = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        far = sorted(np.linalg.norm(grads[i] - grads[j]) ** power for j in others)
        scores.append(sum(far[: count - faulty - 2]))
    return np.isin(np.arange(count), np.argsort(scores)[:selected]) / selected


@pytest.mark.parametrize(("faulty", "selected"), [(0, 1), (1, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_definition(faulty, selected, squared, seed):
    grads = np.random.default_rng(seed).normal(size=(6, 5))
    found = aggregation.weights.krum(
        jnp.asarray(grads @ grads.T, jnp.float32), faulty, selected, squared=squared
    )
    want = oracle(grads, faulty, selected, 2 if squared else 1)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_a_huge_gradient_is_not_chosen():
    grads = np.random.default_rng(0).normal(size=(5, 3)) + 1
    grads[2] = 1e15
    tx = aggregation.krum(faulty=1, selected=3)
    tree = {"w": jnp.asarray(grads, jnp.float32)}
    out = tx.update(tree, tx.init({"w": tree["w"][0]}))[0]["w"]
    assert np.abs(out).max() < 10


def test_equal_gradients():
    found = aggregation.weights.krum(jnp.ones((4, 4)), 1, 2)
    assert found.tolist() == [0.5, 0.5, 0, 0]


def test_refuses_too_few_tasks():
    with pytest.raises(ValueError, match="krum: 3 tasks, wanted at least 4"):
        aggregation.weights.krum(jnp.eye(3), 1)
    with pytest.raises(ValueError, match="krum: selected is 0, wanted 1 or more"):
        aggregation.krum(selected=0)


def test_nan_is_not_outvoted():
    grads = jnp.ones((4, 3)).at[1].set(jnp.nan)
    assert np.isnan(aggregation.weights.krum(grads @ grads.T)).all()
