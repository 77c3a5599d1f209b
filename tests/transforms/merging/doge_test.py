"""DOGE against its loss, differentiated by differences and stepped in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=2, shape=(5, 4)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(x, **options):
    options = {"layout": "out_in", **options}
    return np.asarray(merging.doge({"w": jnp.asarray(x, jnp.float32)}, **options)["w"])


def factors(x, scale):
    return np.array([scale / np.linalg.norm(tau) for tau in x])


def loss(shift, x, scale):
    """sum_t sum_o <tau_t[o], tau_t[o] - sum_k l_k (tau_k + D)[o]>^2."""
    merged = sum(f * (tau + shift) for f, tau in zip(factors(x, scale), x, strict=True))
    return sum((((tau * (tau - merged)).sum(1)) ** 2).sum() for tau in x)


def slope(shift, x, scale):
    out = np.zeros_like(shift)
    for at in np.ndindex(shift.shape):
        step = np.zeros_like(shift)
        step[at] = 1e-5
        out[at] = (loss(shift + step, x, scale) - loss(shift - step, x, scale)) / 2e-5
    return out


def shared(x, subspace):
    """Projector on the directions of outputs that the tasks share."""
    side = min(x.shape[1:])
    own = [np.linalg.svd(tau)[0][:, : side // len(x)] for tau in x]
    u = np.linalg.svd(np.concatenate(own, 1))[0][:, : side // subspace]
    return u @ u.T


def oracle(x, scale, subspace, steps, rate, density):
    shift, mean, square = np.zeros(x.shape[1:]), 0.0, 0.0
    off = np.eye(x.shape[1]) - shared(x, subspace)
    for i in range(1, steps + 1):
        g = off @ slope(shift, x, scale)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        corrected = np.sqrt(square / (1 - 0.999**i)) + 1e-8
        shift = shift - rate * mean / (1 - 0.9**i) / corrected
    kept = int(density * x[0].size)
    out = 0.0
    for f, tau in zip(factors(x, scale), x, strict=True):
        cut = np.sort(np.abs(tau).ravel())[-kept]
        out = out + f * (tau + shift) * (np.abs(tau) >= cut)
    return out


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_matches_the_method(layout):
    x = draw(0)
    given = x.swapaxes(1, 2) if layout == "in_out" else x
    options = {"scale": 0.7, "subspace": 2, "steps": 12, "density": 0.4}
    got = run(given, layout=layout, learning_rate=0.03, **options)
    got = got.T if layout == "in_out" else got
    want = oracle(x, rate=0.03, **options)
    np.testing.assert_allclose(got, want, atol=2e-3)
    still = oracle(x, rate=0.03, **{**options, "steps": 0})
    assert np.abs(still - want).max() > 0.05


def test_descends_on_the_loss():
    x = draw(1)
    options = {"scale": 0.7, "subspace": 4, "density": 1.0}
    start = oracle(x, steps=0, rate=0.01, **options)
    got = run(x, steps=200, learning_rate=0.01, **options)
    shift = (got - start) / factors(x, 0.7).sum()
    assert loss(shift, x, 0.7) < 0.9 * loss(0 * shift, x, 0.7)


def test_a_shift_leaves_shared_directions_alone():
    # Half of the directions of each task: together all that outputs have.
    x = draw(4, 2, (4, 5))
    options = {"learning_rate": 0.1, "steps": 12, "scale": 0.7, "density": 1.0}
    start = oracle(x, 0.7, 1, 0, 0.1, 1.0)
    np.testing.assert_allclose(run(x, subspace=1, **options), start, atol=1e-5)
    assert np.abs(run(x, subspace=9, **options) - start).max() > 0.05


def test_equal_norms_and_masks_over_all_matrices():
    x = draw(2)
    options = {"steps": 0, "scale": 0.5, "density": 1.0}
    one = run(np.stack([x[0], 0 * x[0]]), **options)
    np.testing.assert_allclose(np.linalg.norm(one), 0.5, rtol=1e-5)
    # The length of a task's vector does not matter.
    np.testing.assert_allclose(
        run(x * np.array([100.0, 0.01])[:, None, None], **options),
        run(x, **options), atol=1e-5,
    )  # fmt: skip
    taus = {
        "big": jnp.asarray(10 * x, jnp.float32),
        "small": jnp.asarray(x, jnp.float32),
    }
    got = merging.doge(taus, steps=0, density=0.5, layout="out_in")
    assert (np.asarray(got["big"]) != 0).sum() > 2 * (
        np.asarray(got["small"]) != 0
    ).sum()


def test_zero_tasks_and_other_leaves():
    x = draw(3, 2, (2, 3, 4))
    half = np.concatenate([x[:1], 0 * x[:1]])
    taus = {
        "layers": jnp.asarray(half, jnp.bfloat16),
        "bias": jnp.ones((2, 3)),
        "step": jnp.ones((2,), int),
        "narrow": jnp.ones((2, 1, 3)),
    }

    def f(taus):
        return merging.doge(
            taus, steps=2, density=1.0, matrices=lambda n, s: len(s) > 1
        )

    got = jax.jit(f)(taus)
    assert got["layers"].dtype == jnp.bfloat16 and got["layers"].any()
    assert jnp.isfinite(got["layers"]).all() and jnp.isfinite(got["narrow"]).all()
    assert not got["bias"].any() and got["step"] == 0
    # Layers of a stack have norms of their own, that of one task here.
    norms = jnp.linalg.norm(got["layers"].astype(jnp.float32), axis=(1, 2))
    np.testing.assert_allclose(norms, 0.07, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"subspace": 0}, "subspace 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"density": 1.5}, "density is 1.5"),
        ({"svd": "fast"}, "svd is 'fast'"),
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"matrices": lambda name, s: False}, "no leaf of taus is a matrix"),
        ({"scale": "x"}, "scale is 'x', wanted a number"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"doge: .*{message}"):
        run(draw(0), **options)
