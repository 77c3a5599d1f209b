"""OPCM against the sequential definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, shape=(6, 4)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def oracle(w, b, alpha):
    """Merged and scaled after every task, over the model of w [T, m, n] and b [T, k].

    The previous lambda undoes the previous scale, as in the paper.
    """

    def norm(w, b):
        return np.sqrt((w**2).sum() + (b**2).sum())

    norms = [norm(w[0], b[0])]
    merged, bias, previous = w[0], b[0], 1.0
    for new, new_bias in zip(w[1:], b[1:], strict=True):
        norms.append(norm(new, new_bias))
        u, s, vt = np.linalg.svd(merged)
        rank = next(
            r for r in range(len(s) + 1) if s[:r].sum() >= alpha * s.sum() - 1e-9
        )
        inside = u.T @ new @ vt.T
        inside[:rank, :rank] = 0
        np.fill_diagonal(inside, 0)
        merged = previous * merged + u @ inside @ vt
        bias = previous * bias + new_bias
        previous = norm(merged, bias) / np.mean(norms)
        merged, bias = merged / previous, bias / previous
    return merged, bias


def run(w, b=None, **options):
    taus = {"w": jnp.asarray(w, jnp.float32)}
    if b is not None:
        taus["b"] = jnp.asarray(b, jnp.float32)
    return {k: np.asarray(v) for k, v in merging.opcm(taus, **options).items()}


@pytest.mark.parametrize("svd", ["svd", "gram"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_matches_the_sequence(svd, alpha, shape):
    w, b = draw(0, shape=shape), draw(1, shape=(5,))
    merged, bias = oracle(w, b, alpha)
    got = run(w, b, alpha=alpha, svd=svd)
    np.testing.assert_allclose(got["w"], merged, atol=1e-3)
    np.testing.assert_allclose(got["b"], bias, atol=1e-3)


def test_all_protected_adds_only_what_the_first_does_not_reach():
    w = draw(2, 2, (4, 4))
    got = run(w, alpha=1.0)["w"]
    first = w[0] * np.linalg.norm(w, axis=(1, 2)).mean() / np.linalg.norm(w[0])
    np.testing.assert_allclose(got, first, atol=1e-4)


def test_equal_experts_and_one_task_are_themselves():
    w = draw(3, 1)
    np.testing.assert_allclose(run(w)["w"], w[0], atol=1e-5)
    np.testing.assert_allclose(run(np.concatenate([w] * 3))["w"], w[0], atol=1e-4)


def test_tasks_apart_are_kept_whole():
    w = np.zeros((2, 4, 4))
    w[0, :2, :2], w[1, 2:, 2:] = 1.0, draw(4, 1, (2, 2))[0]
    got = run(w, alpha=1.0)["w"]
    ratio = np.linalg.norm(w, axis=(1, 2)).mean() / np.linalg.norm(w.sum(0))
    np.testing.assert_allclose(got, ratio * w.sum(0), atol=1e-5)


def test_the_norm_is_the_mean_of_the_norms_and_weights_scale():
    w = draw(5)
    got = run(w, weights=[1.0, 2.0, 3.0])["w"]
    scaled = w * np.array([1.0, 2.0, 3.0])[:, None, None]
    np.testing.assert_allclose(got, run(scaled)["w"], atol=1e-5)
    want = np.linalg.norm(scaled, axis=(1, 2)).mean()
    np.testing.assert_allclose(np.linalg.norm(got), want, rtol=1e-5)


def test_zero_opposite_and_other_leaves():
    w = draw(6, 2)
    assert not run(0 * w)["w"].any()
    assert np.isfinite(run(np.stack([w[0], -w[0]]))["w"]).all()
    np.testing.assert_allclose(
        run(np.stack([0 * w[0], w[1]]))["w"], w[1] / 2, atol=1e-5
    )
    taus = {
        "empty": jnp.zeros((2, 0, 3)),
        "layers": jnp.asarray(draw(7, 2, (2, 3, 4)), jnp.bfloat16),
        "step": jnp.zeros((2, 2), jnp.int32),
    }

    def f(taus):
        return merging.opcm(taus, matrices=lambda _, shape: len(shape) == 3)

    got, again = f(taus), jax.jit(f)(taus)
    assert got["layers"].dtype == jnp.bfloat16 and got["step"].dtype == jnp.int32
    np.testing.assert_allclose(
        got["layers"].astype(jnp.float32),
        again["layers"].astype(jnp.float32),
        atol=3e-2,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "sketch"}, "svd is 'sketch'"),
        ({"alpha": 1.5}, "alpha is 1.5, wanted 0 <= alpha <= 1"),
        ({"weights": [1.0]}, r"weights are \(1,\)"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"opcm: {message}"):
        run(draw(0), **options)
