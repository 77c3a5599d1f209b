import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weigh = jax.jit(aggregation.weights.mgda, static_argnames="normalize")


def oracle(gram):
    """Tries all supports, float64."""
    best, found = np.inf, None
    for on in itertools.product([False, True], repeat=len(gram)):
        on = np.array(on)
        if not on.any():
            continue
        part = gram[np.ix_(on, on)] / np.mean(np.diag(gram)[on])
        ones = np.ones(on.sum())
        # Stationary points of w^T G w on the plane sum w = 1.
        kkt = np.block([[part, -ones[:, None]], [ones[None], np.zeros((1, 1))]])
        solved = np.linalg.lstsq(kkt, np.append(0 * ones, 1), rcond=None)[0][:-1]
        w = np.zeros(len(gram))
        w[on] = solved
        feasible = w.min() >= -1e-9 and abs(w.sum() - 1) < 1e-6
        if feasible and w @ gram @ w < best - 1e-15:
            best, found = w @ gram @ w, w
    return found


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.sampled_from([2, 3, 50]), st.sampled_from([0, 3])
)
def test_finds_the_shortest_combination(seed, width, scale):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4, width)) * 10 ** rng.uniform(-scale, 0, (4, 1))
    w = np.asarray(weigh(jnp.asarray(g @ g.T, jnp.float32)), float)
    want = oracle(g @ g.T)
    shortest = min(np.linalg.norm(g, axis=1))
    assert np.linalg.norm(w @ g) <= np.linalg.norm(want @ g) + 1e-3 * shortest
    if width > 4 and not scale:  # Elsewhere several weights may give the same vector.
        np.testing.assert_allclose(w, want, atol=1e-4)


@pytest.mark.parametrize(
    ("gram", "want"),
    [
        ([[1.0, 0.0], [0.0, 3.0]], [0.75, 0.25]),
        ([[1.0, 2.0], [2.0, 9.0]], [1.0, 0.0]),  # the shorter one is shortest
        ([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]),  # opposite
        ([[1.0, 1.0], [1.0, 1.0]], [0.5, 0.5]),  # equal, up to which of them
        ([[0.0, 0.0], [0.0, 2.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
        ([[4.0]], [1.0]),
    ],
)
def test_closed_forms(gram, want):
    gram, want = np.array(gram), np.array(want)
    w = np.asarray(aggregation.weights.mgda(jnp.float32(gram)))
    np.testing.assert_allclose(w @ gram @ w, want @ gram @ want, atol=1e-6)
    if gram[0, 0] != gram[-1, 0] or len(want) == 1:
        np.testing.assert_allclose(w, want, atol=1e-6)


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss_l2"])
def test_normalising_is_dividing_before(normalize):
    rng = np.random.default_rng(3)
    g = rng.normal(size=(4, 30)) * np.array([[1e-2], [1.0], [3.0], [10.0]])
    losses = np.array([0.5, 2.0, 1e-3, 4.0])
    norms = np.linalg.norm(g, axis=1)
    sizes = {"l2": norms, "loss": losses, "loss_l2": norms * losses}[normalize]
    divided = g / sizes[:, None]
    w = weigh(
        jnp.asarray(g @ g.T, jnp.float32), jnp.float32(losses), normalize=normalize
    )
    np.testing.assert_allclose(w, oracle(divided @ divided.T), atol=2e-4)


def test_a_loss_of_zero_is_a_very_small_one():
    gram = jnp.eye(2)
    for low in (0.0, -1.0):
        losses = jnp.array([low, 1.0])
        w = aggregation.weights.mgda(gram, losses, normalize="loss")
        np.testing.assert_allclose(w, [0, 1], atol=1e-6)


def test_names_what_is_missing():
    with pytest.raises(ValueError, match="mgda: losses are missing"):
        aggregation.weights.mgda(jnp.eye(2), normalize="loss")
    with pytest.raises(ValueError, match=r"mgda: losses are \(3,\), wanted \(2,\)"):
        aggregation.weights.mgda(jnp.eye(2), jnp.ones(3), normalize="loss")
    with pytest.raises(ValueError, match="mgda: normalize is 'l3'"):
        aggregation.mgda(normalize="l3")
    with pytest.raises(ValueError, match="mgda: normalize is 'l3'"):
        aggregation.weights.mgda(jnp.eye(2), normalize="l3")
    tx = aggregation.mgda(normalize="loss")
    grads = {"w": jnp.eye(2)}
    with pytest.raises(ValueError, match="mgda: losses are missing"):
        tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    updates, _ = tx.update(
        grads, tx.init({"w": jnp.zeros(2)}), losses=jnp.array([1.0, 2.0])
    )
    np.testing.assert_allclose(updates["w"], [0.2, 0.8], atol=1e-6)
