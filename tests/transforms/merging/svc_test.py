"""Singular value calibration against its formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, shape=(6, 4)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(x, **options):
    return np.asarray(merging.svc({"w": jnp.asarray(x, jnp.float32)}, **options)["w"])


def oracle(x, merged, alpha):
    """Algorithm 1 on [T, out, in], direction by direction."""
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    out = np.zeros_like(merged)
    for r in range(len(s)):
        counts = 0.0
        for tau in x:
            own = u[:, r] @ tau
            norm = own @ own
            counts += max(alpha, s[r] * vt[r] @ own / norm if norm else alpha)
        out += len(x) / counts * s[r] * np.outer(u[:, r], vt[r])
    return out


@pytest.mark.parametrize("svd", ["svd", "gram"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_matches_algorithm_1(svd, alpha, shape):
    x = draw(0, shape=shape) + draw(1, 1, shape)
    got = run(x, alpha=alpha, layout="out_in", svd=svd)
    np.testing.assert_allclose(got, oracle(x, x.sum(0), alpha), atol=1e-3)


def test_flax_kernels_are_turned():
    x = draw(2)
    got = run(x.swapaxes(1, 2), layout="in_out").T
    np.testing.assert_allclose(got, oracle(x, x.sum(0), 1.0), atol=1e-3)


def test_any_rule_with_weights():
    x = draw(3)
    rule = functools.partial(merging.ties, density=0.6)
    taus = {"w": jnp.asarray(x, jnp.float32)}
    merged = np.asarray(rule(taus, weights=jnp.array([1.0, 2.0, 3.0]))["w"], np.float64)
    got = run(x, rule=rule, weights=[1.0, 2.0, 3.0], layout="out_in")
    np.testing.assert_allclose(got, oracle(x, merged, 1.0), atol=1e-3)


def test_equal_experts_are_counted_once():
    tau = draw(4, 1)[0]
    np.testing.assert_allclose(run(np.stack([tau] * 3)), tau, atol=1e-5)
    np.testing.assert_allclose(run(tau[None]), tau, atol=1e-5)


def test_nothing_is_amplified_and_orthogonal_tasks_stay():
    x = draw(5)
    merged = np.linalg.svd(x.sum(0), compute_uv=False)
    assert (np.linalg.svd(run(x), compute_uv=False) <= merged + 1e-5).all()
    apart = np.zeros((2, 4, 4))
    apart[0, 0, 0], apart[1, 1, 1] = 2.0, 1.0
    np.testing.assert_allclose(run(apart), apart.sum(0), atol=1e-6)


def test_zero_and_opposite_tasks_and_other_leaves():
    x = draw(6, 2)
    assert not run(0 * x).any()
    assert not run(np.stack([x[0], -x[0]])).any()
    taus = {
        "bias": jnp.ones((2, 3)),
        "w": jnp.asarray(x, jnp.bfloat16),
        "empty": jnp.zeros((2, 0, 3)),
        "one": jnp.ones((2, 1, 1)),
    }
    got = jax.jit(merging.svc)(taus)
    assert got["bias"].tolist() == [2.0] * 3 and got["w"].dtype == jnp.bfloat16
    assert got["one"].tolist() == [[1.0]]


def test_order_and_scale():
    x = draw(7)
    base = run(x)
    np.testing.assert_allclose(run(x[[1, 2, 0]]), base, atol=1e-4)
    np.testing.assert_allclose(run(4 * x), 4 * base, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "sketch"}, "svd is 'sketch'"),
        ({"alpha": 0}, "alpha is 0.0, wanted more than 0"),
        ({"alpha": "x"}, "alpha is 'x', wanted a number"),
        ({"layout": "io"}, "layout is 'io'"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"svc: {message}"):
        run(draw(0), **options)
