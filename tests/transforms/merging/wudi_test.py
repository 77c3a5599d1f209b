"""WUDI against its loss, differentiated and stepped in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, shape=(5, 4)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(x, **options):
    return np.asarray(merging.wudi({"w": jnp.asarray(x, jnp.float32)}, **options)["w"])


def loss(m, x):
    """sum_t |(M - tau_t) tau_t^T|^2 / |tau_t|^2 of [T, out, in]."""
    return sum((((m - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in x)


def descended(x, steps, rate):
    """Adam on that loss, term by term."""
    m, mean, square = x.sum(0), 0.0, 0.0
    for i in range(1, steps + 1):
        slope = sum(2 * (m - tau) @ tau.T @ tau / (tau**2).sum() for tau in x)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        corrected = np.sqrt(square / (1 - 0.999**i)) + 1e-8
        m = m - rate * mean / (1 - 0.9**i) / corrected
    return m


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_matches_adam_on_the_loss(layout):
    x = draw(0)
    given = x.swapaxes(1, 2) if layout == "in_out" else x
    got = run(given, steps=20, learning_rate=0.02, layout=layout)
    got = got.T if layout == "in_out" else got
    np.testing.assert_allclose(got, descended(x, 20, 0.02), atol=1e-3)


def test_exact_is_the_minimum_and_the_limit_of_steps():
    x = draw(1)
    got = run(x, solver="exact", layout="out_in")
    best = loss(got.astype(np.float64), x)
    for seed in range(20):
        other = got + 0.1 * draw(seed, 1)[0]
        assert best < loss(other, x)
    many = run(x, steps=2000, learning_rate=0.01, layout="out_in")
    assert abs(loss(many.astype(np.float64), x) - best) < 1e-2 * best


def test_exact_leaves_inputs_alone_that_no_task_has():
    x = draw(2, 2)
    x[:, :, 2:] = 0
    got = run(x, solver="exact", layout="out_in")
    assert np.abs(got[:, 2:]).max() < 1e-5
    assert loss(got.astype(np.float64), x) < loss(x.sum(0), x)


def test_defaults_move_little_and_downhill():
    x = draw(3)
    got = run(x, layout="out_in")
    assert 0 < np.abs(got - x.sum(0)).max() < 300 * 1.1e-5
    assert loss(got.astype(np.float64), x) < loss(x.sum(0), x)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_identities(solver):
    x = draw(4)
    np.testing.assert_allclose(run(x[:1], solver=solver), x[0], atol=1e-5)
    apart = np.zeros((2, 4, 4))
    apart[0, :2, :2], apart[1, 2:, 2:] = 1.0, 2.0
    np.testing.assert_allclose(run(apart, solver=solver), apart.sum(0), atol=1e-5)
    assert not run(0 * x, solver=solver).any()
    half = np.stack([x[0], 0 * x[0]])
    np.testing.assert_allclose(run(half, solver=solver), x[0], atol=1e-5)
    pair = run(np.stack([x[0], -x[0]]), solver=solver)
    np.testing.assert_allclose(pair, 0 * pair, atol=1e-5)


def test_exact_equal_experts_are_one_and_scale_order():
    x = draw(5)
    same = run(np.stack([x[0]] * 3), solver="exact")
    np.testing.assert_allclose(same, x[0], atol=1e-3)
    base = run(x, solver="exact")
    np.testing.assert_allclose(run(x[[1, 2, 0]], solver="exact"), base, atol=1e-3)
    np.testing.assert_allclose(run(4 * x, solver="exact"), 4 * base, atol=4e-3)
    np.testing.assert_allclose(
        run(x, solver="exact", weights=[4.0] * 3), 4 * base, atol=4e-3
    )


def test_trees_and_jit():
    x = draw(6, 2, (2, 5, 4))
    taus = {
        "bias": jnp.asarray(x[:, 0, 0], jnp.float32),
        "layers": jnp.asarray(x, jnp.bfloat16),
        "one": jnp.asarray([[[1.0]], [[3.0]]]),
        "empty": jnp.zeros((2, 0, 3)),
    }

    def f(taus):
        return merging.wudi(taus, steps=3, matrices=lambda _, s: len(s) == 3)

    for got in (f(taus), jax.jit(f)(taus)):
        assert got["layers"].dtype == jnp.bfloat16 and got["one"].tolist() == [[2.0]]
        np.testing.assert_allclose(got["bias"], taus["bias"].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "solver is 'sgd'"),
        ({"steps": -1}, "steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": "x"}, "learning_rate is 'x', wanted a number"),
        ({"weights": [1.0, -1.0, 0.0]}, "a sum other than 0"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"wudi: .*{message}"):
        run(draw(0), **options)
