"""Two-word counts against Python's whole numbers."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import _wide

pytestmark = pytest.mark.fast
NUMBERS = st.integers(0, 2**47)


def back(x):
    assert int(x.low) < 2**16
    return int(x.high) * 2**16 + int(x.low)


@hypothesis.given(NUMBERS, NUMBERS)
def test_arithmetic_is_that_of_whole_numbers(a, b):
    x, y = _wide.wide(a), _wide.wide(b)
    assert back(x) == a
    assert back(_wide.add(x, y)) == a + b
    if a >= b:
        assert back(_wide.subtract(x, y)) == a - b
    assert bool(_wide.less(x, y)) == (a < b)
    assert back(_wide.minimum(x, y)) == min(a, b)
    assert bool(_wide.positive(x)) == (a > 0)
    assert int(_wide.narrow(x)) == min(a, 2**32 - 1)


def test_arrays_are_taken_as_they_are():
    value = np.array([0, 1, 2**16, 2**32 - 1], np.uint32)
    found = _wide.wide(jnp.asarray(value))
    np.testing.assert_array_equal(_wide.narrow(found), value)


@pytest.mark.parametrize("span", [2**32 - 1, 24, 6, 4])
def test_counts_do_not_depend_on_the_blocks(monkeypatch, span):
    monkeypatch.setattr(_wide, "SPAN", span)
    keep = np.random.default_rng(0).random((2, 5, 6, 4)) < 0.4
    found = _wide.count(jnp.asarray(keep), (1, 2, 3))
    np.testing.assert_array_equal(_wide.narrow(found), keep.sum((1, 2, 3)))
    kept = _wide.count(jnp.asarray(keep), (1, 2, 3), keepdims=True)
    assert kept.low.shape == (2, 1, 1, 1)


def test_splits_where_the_last_axes_fit(monkeypatch):
    monkeypatch.setattr(_wide, "SPAN", 24)
    assert _wide.split((2, 5, 6, 4), (1, 2, 3)) == ([1], [2, 3])
    assert _wide.split((2, 3), ()) == ([], [])
    with pytest.raises(ValueError, match="too many entries"):
        _wide.split((2, 25), (1,))
