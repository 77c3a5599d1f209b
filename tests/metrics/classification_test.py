import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import metrics


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_top_k_counts_the_logits_ahead(seed, k):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, (8, 5)).astype(np.float32)  # ties on purpose
    labels = rng.integers(0, 5, 8)
    want = [
        c in np.argsort(-row, kind="stable")[:k]
        for row, c in zip(logits, labels, strict=True)
    ]
    arguments = jnp.asarray(logits), jnp.asarray(labels, jnp.int32)
    np.testing.assert_array_equal(metrics.top_k_accuracy(*arguments, k), want)
    if k == 1:
        np.testing.assert_array_equal(metrics.accuracy(*arguments), want)


@pytest.mark.fast
def test_inactive_classes_cannot_win():
    logits = jnp.array([[9.0, 1.0, 2.0], [0.0, 5.0, 4.0]], jnp.bfloat16)
    mask = jnp.array([False, True, True])
    got = metrics.accuracy(logits, jnp.array([2, 1]), mask)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1, 1])


@pytest.mark.fast
def test_nan_logits_and_impossible_labels_are_wrong():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(metrics.accuracy(logits, jnp.array([0, 7])), [0, 0])
    np.testing.assert_array_equal(
        metrics.top_k_accuracy(logits, jnp.array([0, -1]), 2), [0, 0]
    )


@pytest.mark.fast
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="accuracy: wanted logits"):
        metrics.accuracy(jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\]"):
        metrics.top_k_accuracy(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), 4)


@pytest.mark.parametrize("seed", range(4))
def test_roc_auc_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(np.float32)  # Many ties.
    labels = rng.integers(0, 2, 40)
    ones, zeros = scores[labels == 1][:, None], scores[labels == 0]
    wanted = np.mean((ones > zeros) + 0.5 * (ones == zeros))
    np.testing.assert_allclose(metrics.roc_auc(scores, labels), wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics.roc_auc(-scores, labels), 1 - wanted, rtol=1e-5)


def test_roc_auc_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="both classes, found 2 of 2 positive"):
        metrics.roc_auc(jnp.ones(2), jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"scores and labels \[N\]"):
        metrics.roc_auc(jnp.ones((2, 1)), jnp.ones(2, int))
