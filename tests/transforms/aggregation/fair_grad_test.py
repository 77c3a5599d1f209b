import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation
from mtl_jax.transforms.aggregation import _fair_grad
from mtl_jax.transforms.aggregation._cosine import cosine_gram


@functools.cache
def weigher(alpha):
    return jax.jit(lambda gram: aggregation.weights.fair_grad(gram, alpha))


def weights(grads, alpha=1.0):
    return weigher(alpha)(jnp.asarray(grads @ grads.T, jnp.float32))


def oracle(grads, alpha):
    """The root of gram @ w = w^(-1/alpha), by damped Newton steps in float64."""
    gram, power = grads @ grads.T, 1 / alpha
    w = np.diag(gram) ** (-1 / (1 + power))
    for _ in range(300):
        residual = gram @ w - w**-power
        step = -np.linalg.solve(gram + np.diag(power * w ** (-power - 1)), residual)
        w = w + min(1, 0.9 / max((-step / w).max(), 1e-30)) * step
    np.testing.assert_allclose(gram @ w * w**power, 1, rtol=1e-6)
    return w


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_solves_the_equations(alpha, count):
    rng = np.random.default_rng(count)
    for spread in (1.0, 0.8):
        grads = rng.normal(size=(count, 12)) * 10 ** rng.uniform(-1, 1, (count, 1))
        grads -= (1 - spread) * grads.mean(0)
        w = weights(grads, alpha)
        assert (np.asarray(w) > 0).all()
        np.testing.assert_allclose(w, oracle(grads, alpha), rtol=5e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("shared", "signs"), [(10, 1), (100, 1), (1, -1), (2, -1)])
def test_strongly_correlated(alpha, shared, signs):
    """As close as a Gramian of cosines that are off by the ridge and rounding allows.

    With x = w norms, cosines off by r change the slopes in log w by r x[i] sum(x) at
    most, and the Hessian there is `diag(w) G diag(w) + p diag(w^(1 - p))` or more.
    """
    rng = np.random.default_rng(0)
    signs = np.array([1, signs] * 4)[:, None]
    grads = rng.normal(size=(8, 12)) + shared * signs * rng.normal(size=12)
    want, power = oracle(grads, alpha), 1 / alpha
    x = want * np.linalg.norm(grads, axis=1)
    off = 1e-6 + 10 * np.finfo(np.float32).eps
    bound = off * np.linalg.norm(x) * x.sum() / (power * (want ** (1 - power)).min())
    assert bound < 0.1
    np.testing.assert_allclose(weights(grads, alpha), want, rtol=bound + 1e-6)


def test_stationary_points(monkeypatch):
    """Shares of hundreds, within the noise of cosines, and in no more than 6 steps."""
    monkeypatch.setattr(_fair_grad, "_STEPS", 6)
    grads = np.random.default_rng(0).normal(size=(8, 2))
    gram = grads @ grads.T
    split = cosine_gram("test", jnp.asarray(gram, jnp.float32))
    x = np.asarray(_fair_grad.fair_shares(split, 1.0), float)
    norms = np.sqrt(np.diag(gram))
    matrix = gram / norms / norms[:, None] + (1e-6 + 8 * 2.0**-23) * np.eye(8)
    want = np.ones(8)
    for _ in range(100):
        hessian = matrix + np.diag(want**-2.0)
        step = -np.linalg.solve(hessian, matrix @ want - 1 / want)
        want = want + min(1, 0.9 / max((-step / want).max(), 1e-30)) * step
    np.testing.assert_allclose(x, want, rtol=0.15)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_any_scale(alpha, scale):
    grads = np.random.default_rng(0).normal(size=(8, 12)) * scale
    np.testing.assert_allclose(weights(grads, alpha), oracle(grads, alpha), rtol=2e-3)


def test_lengths_twelve_orders_apart():
    grads = np.random.default_rng(0).normal(size=(8, 12))
    grads *= 10 ** np.linspace(-6, 6, 8)[:, None]
    np.testing.assert_allclose(weights(grads), oracle(grads, 1.0), rtol=2e-3)


def test_no_fairness_is_the_mean():
    assert aggregation.weights.fair_grad(jnp.eye(4), 0).tolist() == [0.25] * 4


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
def test_stationary_dependent_and_zero_gradients_are_finite(alpha):
    opposite = np.ones((8, 4)) * (-1.0) ** np.arange(8)[:, None]
    equal = np.ones((8, 4))
    zero = np.eye(8) * np.arange(8)[:, None]
    for grads in (opposite, equal, zero, 0 * equal):
        w = weights(grads, alpha)
        assert np.isfinite(w).all()
        assert ((np.asarray(w) > 0) == grads.any(1)).all()


def test_batches_of_gramians():
    grads = np.random.default_rng(1).normal(size=(5, 8, 12))
    grams = jnp.asarray(grads @ grads.transpose(0, 2, 1), jnp.float32)
    batch = jax.jit(jax.vmap(aggregation.weights.fair_grad))(grams)
    for gram, w in zip(grams, batch, strict=True):
        np.testing.assert_allclose(w, weigher(1.0)(gram), rtol=1e-4)


def test_nan_shows_and_ends():
    w = weights(np.full((8, 2), np.nan))
    assert np.isnan(w).all()


def test_refuses_negative_alpha():
    with pytest.raises(ValueError, match="fair_grad: alpha is -1, wanted 0 or more"):
        aggregation.fair_grad(alpha=-1)


@pytest.mark.parametrize("count", [64, 128])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_exactly_opposed_gradients_stay_finite(count, scale):
    signs = np.where(np.arange(count) % 2, -1, 1)
    gram = jnp.asarray(scale * np.outer(signs, signs), jnp.float32)
    for weigh in (aggregation.weights.fair_grad, aggregation.weights.nash_mtl):
        found = weigh(gram)
        assert bool(jnp.all(jnp.isfinite(found) & (found > 0)))
