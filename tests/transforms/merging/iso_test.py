"""Iso-C and Iso-CTS against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def polar(x):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    real = s > 1e-6 * s[:1]
    return u[:, real] @ vt[real]


def flat(taus):
    total = taus.sum(0)
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def common_and_own(taus, fraction):
    """Algorithm 2 on float64 [T, out, in]."""
    T, k = len(taus), min(taus.shape[1:])
    own = min(round((k - int(k * fraction + 1e-9)) / T), k // T)
    u, s, vt = np.linalg.svd(taus.sum(0), full_matrices=False)
    c = k - own * T
    real = s[:c] > 1e-6 * max(s[0], 1e-30)
    us, ss, vts = [u[:, :c] * real], [s[:c] * real], [vt[:c] * real[:, None]]
    for tau in taus:
        ut, st, vtt = np.linalg.svd(tau - us[0] @ us[0].T @ tau, full_matrices=False)
        us.append(ut[:, :own])
        ss.append(st[:own])
        vts.append(vtt[:own])
    both = polar(np.concatenate(us, 1)) @ polar(np.concatenate(vts, 0))
    return np.concatenate(ss).mean() * both


def draw(seed, T=3, shape=(7, 9)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(rule, x, **options):
    return np.asarray(
        getattr(merging, rule)({"w": jnp.asarray(x, jnp.float32)}, **options)["w"]
    )


def close(got, want, tolerance=1e-4):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("polar", ["svd", "gram", "newton"])
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_iso_c_matches_the_formula(polar, shape):
    for seed in range(3):
        x = draw(seed, shape=shape)
        close(run("iso_c", x, polar=polar), flat(x), 1e-3)


def test_iso_c_has_one_singular_value_and_the_sum_of_all():
    x = draw(3)
    values = np.linalg.svd(run("iso_c", x), compute_uv=False)
    want = np.linalg.svd(x.sum(0), compute_uv=False)
    np.testing.assert_allclose(values, np.full(7, want.mean()), rtol=1e-5)


@pytest.mark.parametrize(
    ("fraction", "layout"), [(0.0, "in_out"), (0.5, "in_out"), (0.8, "out_in")]
)
def test_iso_cts_matches_the_algorithm(fraction, layout):
    x = draw(4)
    want = common_and_own(x, fraction)
    given = x.swapaxes(1, 2) if layout == "in_out" else x
    got = run("iso_cts", given, common=fraction, layout=layout)
    close(got.T if layout == "in_out" else got, want)


def test_iso_cts_with_the_fast_methods():
    x = draw(5)
    options = {"common": 0.5, "layout": "out_in"}
    want = common_and_own(x, 0.5)
    close(run("iso_cts", x, svd="gram", polar="newton", **options), want, 4e-3)


@pytest.mark.parametrize("svd", ["svd", "gram", "sketch"])
def test_iso_cts_beside_a_strong_common_part(svd):
    x = draw(13, 2, (64, 64))
    u, _, vt = np.linalg.svd(x[0])
    x += 1e3 * u[:, :48] @ vt[:48]
    got = run("iso_cts", x, common=0.75, layout="out_in", svd=svd)
    close(got, common_and_own(x, 0.75), 5e-3)


@pytest.mark.parametrize("svd", ["svd", "sketch"])
def test_iso_cts_of_a_sum_of_low_rank(svd):
    """What tasks have in directions in which the sum is zero is their own."""
    x = draw(12, 2, (9, 9))
    x[1] = -x[0]
    x[1, :2] += 1
    got = run("iso_cts", x, common=0.6, layout="out_in", svd=svd)
    close(got, common_and_own(x, 0.6), 1e-3)


def test_all_common_is_iso_c():
    x = draw(6)
    close(run("iso_cts", x, common=1.0), run("iso_c", x))


def test_more_tasks_than_directions_leave_all_common():
    x = draw(7, 5, (3, 4))
    close(run("iso_cts", x, common=0.0), run("iso_c", x))
    three = draw(8, 2, (3, 4))
    close(
        run("iso_cts", three, common=0.0, layout="out_in"), common_and_own(three, 0.0)
    )


@pytest.mark.parametrize("rule", ["iso_c", "iso_cts"])
def test_order_scale_and_weights(rule):
    x = draw(9)
    base = run(rule, x)
    close(run(rule, x[[2, 0, 1]]), base, 1e-3)
    close(run(rule, 4 * x), 4 * base, 1e-3)
    close(run(rule, x, weights=[4.0] * 3), 4 * base, 1e-3)


@pytest.mark.parametrize("rule", ["iso_c", "iso_cts"])
def test_zero_opposite_and_low_rank_sums(rule):
    x = draw(10, 2)
    assert np.array_equal(run(rule, 0 * x), np.zeros((7, 9)))
    assert np.isfinite(run(rule, np.stack([x[0], -x[0]]))).all()
    if rule == "iso_c":
        low = np.zeros((2, 7, 9))
        low[:, :2] = x[:, :2]
        close(run(rule, low), flat(low))


@pytest.mark.parametrize("rule", ["iso_c", "iso_cts"])
def test_trees(rule):
    x = draw(11, shape=(2, 7, 9))
    taus = {
        "bias": jnp.asarray(x[:, 0, 0], jnp.float32),
        "layers": jnp.asarray(x, jnp.bfloat16),
        "one": jnp.asarray([[[1.0]], [[2.0]], [[6.0]]]),
    }

    def f(taus):
        return getattr(merging, rule)(taus, matrices=lambda _, shape: len(shape) > 1)

    got = f(taus)
    assert got["layers"].dtype == jnp.bfloat16
    np.testing.assert_allclose(got["one"], [[9.0]], rtol=1e-6)
    np.testing.assert_allclose(got["bias"], taus["bias"].mean(0), rtol=1e-5, atol=1e-6)
    first = run(rule, np.asarray(taus["layers"][:, 0].astype(jnp.float32)))
    close(np.asarray(got["layers"][0], np.float64), first, 2e-2)
    again = jax.jit(f)(taus)
    close(
        np.asarray(again["layers"], np.float64),
        np.asarray(got["layers"], np.float64),
        2e-2,
    )


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("iso_c", {"polar": "qr"}, "polar is 'qr'"),
        ("iso_cts", {"svd": "qr"}, "svd is 'qr'"),
        ("iso_cts", {"layout": "io"}, "layout is 'io'"),
        ("iso_cts", {"common": 1.5}, "common is 1.5"),
        ("iso_c", {"weights": [1.0]}, r"weights are \(1,\), wanted \(3,\)"),
    ],
)
def test_refuses_by_name(rule, options, message):
    with pytest.raises(ValueError, match=f"{rule}: {message}"):
        run(rule, draw(0), **options)
