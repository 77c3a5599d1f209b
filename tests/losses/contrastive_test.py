import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses

pytestmark = pytest.mark.fast


def oracle(scores, positives, active):
    """The definition, query by query, in float64."""
    found = []
    for row, good, here in zip(scores, positives, active, strict=True):
        bad = np.exp(row[~good & here]).sum()
        each = [-np.log(np.exp(s) / (np.exp(s) + bad)) for s in row[good]]
        found.append(np.mean(each) if each else np.inf)
    return np.array(found)


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_matches_the_definition(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(6, 9)) * 5
    positives, active = rng.random((6, 9)) < 0.3, rng.random((6, 9)) < 0.8
    got = losses.infonce(
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(positives),
        active=jnp.asarray(active),
    )
    np.testing.assert_allclose(
        got, oracle(scores, positives, active), rtol=1e-4, atol=1e-5
    )


def test_one_positive_is_softmax_cross_entropy():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    labels = jnp.arange(4)
    want = losses.softmax_cross_entropy(scores, labels)
    np.testing.assert_allclose(losses.infonce(scores, labels), want, rtol=1e-5)
    slopes = jax.grad(lambda s: losses.infonce(s, labels).sum())(scores * 100)
    assert np.isfinite(slopes).all()


def test_nothing_to_tell_apart_costs_nothing():
    """Alone, a positive has loss 0 and slope 0; nobody's query costs infinity."""
    scores, alone = jnp.ones((2, 1)), jnp.array([[True], [False]])
    np.testing.assert_array_equal(losses.infonce(scores, alone), [0, np.inf])
    slope = jax.grad(lambda s: losses.infonce(s, alone)[0])(scores)
    np.testing.assert_array_equal(slope, np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("scores", "positives", "active", "message"),
    [
        (jnp.ones(3), jnp.arange(3), None, r"floats \[B, M\], are float32\[3\]"),
        (jnp.ones((2, 3)), jnp.arange(3), None, r"positives must be bool \[2, 3\]"),
        (jnp.ones((2, 2)), jnp.arange(2), jnp.ones(2, bool), "active must be bool"),
    ],
)
def test_what_is_refused(scores, positives, active, message):
    with pytest.raises(ValueError, match=f"infonce: .*{message}"):
        losses.infonce(scores, positives, active=active)
