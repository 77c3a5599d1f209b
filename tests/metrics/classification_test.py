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
