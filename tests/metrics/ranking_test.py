import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import metrics

pytestmark = pytest.mark.fast


def oracle(scores, relevance, k):
    """Ranks one by one."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    gain = sum(relevance[d] / np.log2(r + 2) for r, d in enumerate(order[:k]))
    ideal = sorted(relevance, reverse=True)[:k]
    best = sum(g / np.log2(r + 2) for r, g in enumerate(ideal))
    return gain / best if best else 0.0


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, 10]))
def test_matches_the_definition(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (5, 7)).astype(np.float32)  # ties on purpose
    relevance = rng.integers(0, 3, (5, 7)) * (rng.random((5, 1)) < 0.8)
    want = [oracle(s, r, k) for s, r in zip(scores, relevance, strict=True)]
    got = metrics.ndcg(jnp.asarray(scores), jnp.asarray(relevance), k)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_nan_is_not_hidden():
    found = metrics.ndcg(jnp.array([jnp.nan, 1.0]), jnp.array([True, False]))
    assert np.isnan(found)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"ndcg: wanted .* found \(2,\) and \(3,\)"):
        metrics.ndcg(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="ndcg: k must be 1 or more, is 0"):
        metrics.ndcg(jnp.ones(2), jnp.ones(2), 0)
