import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.train import conflicts


@pytest.mark.fast
def test_conflicts_of_known_gradients():
    grads = jnp.array([[1.0, 0.0], [-1e-18, 0.0], [0.0, 1e18], [0.0, 0.0]])
    gram = grads @ grads.T
    found = conflicts.conflict_metrics(gram)
    assert found["min_cosine"] == -1 and found["conflict_rate"] == pytest.approx(1 / 6)
    assert np.array_equal(np.diag(conflicts.cosines(gram)), np.ones(4))
    alone = conflicts.conflict_metrics(gram[:1, :1])
    assert alone == {"min_cosine": 1, "conflict_rate": 0}
