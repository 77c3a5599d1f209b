"""Corrections of features, learned by hand in float64 as well."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import merging


def draw(seed, T=2, steps=5, batch=6, side=4):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(T, steps, batch, side))
    return h, h + 0.3 * rng.normal(size=(T, 1, 1, side)) + 0.1 * np.abs(h)


def run(h, goal, **options):
    options = {"key": jax.random.key(0), "rank": 3, **options}
    return merging.surgery(
        jnp.asarray(h, jnp.float32), jnp.asarray(goal, jnp.float32), **options
    )


def descended(h, goal, down, up, rate):
    """Gradient descent on the mean distance, derived by hand."""
    losses = []
    for x, y in zip(h, goal, strict=True):
        inner = np.maximum(x @ down, 0)
        error = x - inner @ up - y
        losses.append(np.abs(error).mean())
        slope = np.sign(error) / error.size
        back = (slope @ up.T) * (inner > 0)
        down, up = down + rate * x.T @ back, up + rate * inner.T @ slope
    return down, up, losses


def test_matches_descent_by_hand_for_every_task():
    h, goal = draw(0)
    start = run(h[:, :1], goal[:, :1], tx=optax.sgd(0.0)).params
    got = run(h, goal, tx=optax.sgd(0.5))
    for t in range(2):
        down, up = (np.asarray(start[k][t], float) for k in ("down", "up"))
        down, up, losses = descended(h[t], goal[t], down, up, 0.5)
        np.testing.assert_allclose(got.params["down"][t], down, atol=1e-5)
        np.testing.assert_allclose(got.params["up"][t], up, atol=1e-5)
        np.testing.assert_allclose(got.losses[t], losses, rtol=1e-4)


def test_starts_from_no_correction_and_learns_one_per_task():
    h, goal = draw(1, steps=200)
    start = run(h[:, :1], goal[:, :1], tx=optax.sgd(0.0)).params
    x = jnp.asarray(h[:, 0], jnp.float32)
    assert jnp.array_equal(merging.surgery_apply(start, x), x)
    bound = 4**-0.5
    assert 0.5 * bound < float(jnp.abs(start["down"]).max()) <= bound
    assert not jnp.array_equal(start["down"][0], start["down"][1])
    got = run(h, goal, tx=optax.adam(0.02))
    assert (got.losses[:, -20:].mean(1) < 0.7 * got.losses[:, 0]).all()
    fixed = merging.surgery_apply(got.params, x)
    one = merging.surgery_apply({k: p[1] for k, p in got.params.items()}, x[1])
    np.testing.assert_allclose(fixed[1], one, atol=1e-6)
    # The other task's correction is another one.
    assert (
        np.abs(fixed[1] - goal[1, 0]).mean()
        < np.abs(
            merging.surgery_apply({k: p[0] for k, p in got.params.items()}, x[1])
            - goal[1, 0]
        ).mean()
    )


def test_goes_on_from_where_it_was():
    h, goal = draw(2, steps=6)
    whole = run(h, goal, tx=optax.sgd(0.5))
    half = run(h[:, :3], goal[:, :3], tx=optax.sgd(0.5))
    rest = run(h[:, 3:], goal[:, 3:], tx=optax.sgd(0.5), params=half.params)
    for k in ("down", "up"):
        np.testing.assert_allclose(rest.params[k], whole.params[k], atol=1e-6)


def test_half_precision_features():
    h, goal = draw(3, steps=1)
    half = jnp.asarray(h, jnp.bfloat16)
    got = merging.surgery(half, jnp.asarray(goal, jnp.bfloat16), key=jax.random.key(0))
    assert got.params["up"].dtype == jnp.float32 and got.losses.dtype == jnp.float32
    assert merging.surgery_apply(got.params, half[:, 0]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda h: h[0], {}, r"features are \(5, 6, 4\)"),
        (lambda h: h * np.nan, {}, "'features' holds NaN"),
        (lambda h: h, {"rank": 0}, "rank is 0"),
        (lambda h: h, {"key": 3}, "key is 3"),
        (
            lambda h: h,
            {"params": {"down": np.zeros((1, 4, 2)), "up": np.zeros((1, 2, 4))}},
            r"down and up are \(\(1, 4, 2\), \(1, 2, 4\)\), wanted",
        ),
    ],
)
def test_refuses_by_name(change, options, message):
    h, goal = draw(0)
    with pytest.raises(ValueError, match=f"surgery: .*{message}"):
        run(change(h), goal, **options)


def test_corrections_of_another_width_are_refused():
    params = {"down": jnp.zeros((2, 4, 3)), "up": jnp.zeros((2, 3, 4))}
    for features in (jnp.zeros((3, 1, 4)), jnp.zeros((2, 1, 5))):
        with pytest.raises(ValueError, match="surgery_apply: down is"):
            merging.surgery_apply(params, features)
