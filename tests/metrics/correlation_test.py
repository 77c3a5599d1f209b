"""Rank correlation."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax import metrics

pytestmark = pytest.mark.fast
values = st.lists(st.integers(-4, 4), min_size=2, max_size=12)


@hypothesis.given(values, st.randoms(use_true_random=False))
def test_matches_shared_ranks(x, random):
    """Ranks by counting: how many are below, and half of those that are equal."""
    y = [random.randint(-3, 3) for _ in x]

    def ranks(v):
        return [sum(w < u for w in v) + 0.5 * sum(w == u for w in v) for u in v]

    found = metrics.spearman(x, y)
    a, b = ranks(x), ranks(y)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_only_order_counts():
    x = np.random.default_rng(0).normal(size=20)
    assert metrics.spearman(x, np.exp(x)) == pytest.approx(1)
    assert metrics.spearman(x, -(x**3)) == pytest.approx(-1)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="spearman: wanted"):
        metrics.spearman([1.0], [1.0])
    with pytest.raises(ValueError, match="spearman: found NaN"):
        metrics.spearman([1.0, np.nan], [1.0, 2.0])
