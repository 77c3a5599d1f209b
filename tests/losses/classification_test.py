import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses


def oracle_log_softmax(logits, active):
    out = np.full(logits.shape, -np.inf)
    for i, row in enumerate(logits):
        kept = row[active]
        top = kept.max()
        out[i, active] = kept - top - np.log(np.exp(kept - top).sum())
    return out


@pytest.mark.fast
@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_cross_entropy_is_the_formula(seed, smoothing, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 6)) * spread
    active = rng.random(6) < 0.6
    active[rng.integers(6)] = True
    labels = rng.choice(np.flatnonzero(active), 5)
    log_p = oracle_log_softmax(logits, active)
    want = [
        -(1 - smoothing) * row[c] - smoothing * row[active].mean()
        for row, c in zip(log_p, labels, strict=True)
    ]
    got = losses.softmax_cross_entropy(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(active),
        label_smoothing=smoothing,
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * spread)


def test_cross_entropy_takes_any_leading_shape_and_a_mask_per_example():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    labels = jnp.array([[0, 1, 2], [1, 1, 0]])
    mask = jnp.arange(4) < 3
    whole = losses.softmax_cross_entropy(
        logits, labels, jnp.broadcast_to(mask, logits.shape)
    )
    assert whole.shape == (2, 3)
    np.testing.assert_array_equal(
        whole, losses.softmax_cross_entropy(logits, labels, mask)
    )
    np.testing.assert_allclose(
        whole, losses.softmax_cross_entropy(logits[..., :3], labels), rtol=1e-6
    )


@pytest.mark.parametrize("label", [-1, 4, 2])
def test_label_out_of_range_or_inactive_costs_infinity(label):
    mask = jnp.array([True, True, False, True])
    loss = losses.softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([label]), mask)
    assert loss[0] == jnp.inf


def test_cross_entropy_gradient_is_probability_minus_one_hot():
    logits = jnp.array([[0.5, -1.0, 2.0, 0.0]])
    mask = jnp.array([True, True, True, False])
    grad = jax.grad(
        lambda x: losses.softmax_cross_entropy(x, jnp.array([1]), mask).sum()
    )(logits)
    p = np.exp(np.array([0.5, -1.0, 2.0]))
    p /= p.sum()
    np.testing.assert_allclose(grad[0], [p[0], p[1] - 1, p[2], 0], atol=1e-6)


def test_cross_entropy_of_bf16_logits_is_float32():
    logits = jnp.array([[100.0, 0.0]], jnp.bfloat16)
    loss = losses.softmax_cross_entropy(logits, jnp.array([1], jnp.uint8))
    assert loss.dtype == jnp.float32
    assert loss[0] == 100.0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("labels", "mask", "message"),
    [
        (jnp.zeros((3,), jnp.int32), None, "labels"),
        (jnp.zeros((2,)), None, "integers"),
        (jnp.zeros((2,), jnp.int32), jnp.ones(3, bool), "class_mask"),
        (jnp.zeros((2,), jnp.int32), jnp.ones(4), "class_mask"),
    ],
)
def test_cross_entropy_refuses_by_name(labels, mask, message):
    with pytest.raises(ValueError, match=f"softmax_cross_entropy.*{message}"):
        losses.softmax_cross_entropy(jnp.zeros((2, 4)), labels, mask)


def test_entropy_of_uniform_and_of_certain():
    mask = jnp.array([True, True, True, False])
    uniform = losses.softmax_entropy(jnp.zeros((1, 4)), mask)
    np.testing.assert_allclose(uniform, [np.log(3)], rtol=1e-6)
    certain = losses.softmax_entropy(jnp.array([[1000.0, 0.0, 0.0, 0.0]]))
    assert certain[0] == 0


def test_entropy_gradient_matches_finite_differences():
    logits = jnp.array([0.3, -0.8, 1.5])
    grad = jax.grad(lambda x: losses.softmax_entropy(x[None])[0])(logits)

    def entropy(x):
        p = np.exp(x) / np.exp(x).sum()
        return -(p * np.log(p)).sum()

    eps, x = 1e-5, np.array([0.3, -0.8, 1.5])
    for i in range(3):
        step = eps * np.eye(3)[i]
        slope = (entropy(x + step) - entropy(x - step)) / (2 * eps)
        np.testing.assert_allclose(grad[i], slope, atol=1e-5)


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1.0, 30.0]))
def test_entropy_has_its_range_and_its_slope(seed, spread):
    logits = spread * np.random.default_rng(seed).normal(size=(3, 5))
    entropy = losses.softmax_entropy(jnp.asarray(logits, jnp.float32))
    assert (np.asarray(entropy) >= 0).all()
    assert (np.asarray(entropy) <= np.log(5) + 1e-6).all()
    log_p = oracle_log_softmax(logits, np.ones(5, bool))
    p = np.exp(log_p)
    want = -p * (log_p - (p * log_p).sum(-1, keepdims=True))
    found = jax.grad(lambda x: losses.softmax_entropy(x).sum())(
        jnp.asarray(logits, jnp.float32)
    )
    np.testing.assert_allclose(found, want, atol=2e-5)


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_kl_is_the_formula_and_zero_on_itself(seed):
    p, q = np.random.default_rng(seed).normal(size=(2, 3, 5))
    log_p = oracle_log_softmax(p, np.ones(5, bool))
    log_q = oracle_log_softmax(q, np.ones(5, bool))
    want = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    p, q = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    np.testing.assert_allclose(losses.kl_divergence(p, q), want, atol=1e-5)
    assert not losses.kl_divergence(p, p).any()


@pytest.mark.fast
def test_sigmoid_cross_entropy_is_stable_and_exact():
    logits = jnp.array([-200.0, -1.0, 0.0, 3.0, 200.0])
    targets = jnp.array([0.0, 0.25, 1.0, 1.0, 0.0])
    x, t = np.array([-1.0, 0.0, 3.0]), np.array([0.25, 1, 1])
    s = 1 / (1 + np.exp(-x))
    want = [0, *(-t * np.log(s) - (1 - t) * np.log(1 - s + (t == 1))), 200]
    np.testing.assert_allclose(
        losses.sigmoid_cross_entropy(logits, targets), want, rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("f", [losses.kl_divergence, losses.sigmoid_cross_entropy])
def test_pairs_of_unequal_shape_are_refused(f):
    with pytest.raises(ValueError, match=f.__name__):
        f(jnp.zeros((2, 3)), jnp.zeros((2, 1)))
