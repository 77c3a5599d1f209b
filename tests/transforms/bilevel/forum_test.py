import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import bilevel


def f32(x):
    return jnp.asarray(x, jnp.float32)


def dual(tasks, rows, q, phi):
    """Value of the dual at weights [T, N], by its definition, nu at its best."""
    combined = rows.T @ tasks
    square = q @ q
    nu = np.maximum(phi - (q @ combined) / square, 0)
    return 0.5 * ((combined + nu * q[:, None]) ** 2).sum(0) - nu * phi * square


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("phi", [0.1, 2.0])
def test_weights_solve_the_dual(seed, phi):
    """No point of a grid over the simplex is better, constraint active or not."""
    rng = np.random.default_rng(seed)
    rows, q = rng.normal(size=(3, 5)), rng.normal(size=5)
    found = jax.jit(bilevel.forum_weights, static_argnames="phi")(
        f32(rows @ rows.T), f32(rows @ q), f32(q @ q), phi=phi
    )
    side = np.linspace(0, 1, 101)
    a, b = (v.ravel() for v in np.meshgrid(side, side))
    grid = np.stack([a, b, 1 - a - b])[:, a + b <= 1 + 1e-9]
    tasks = np.asarray(found.tasks, np.float64)
    assert tasks.min() >= 0 and tasks.sum() == pytest.approx(1, abs=1e-5)
    value = dual(tasks[:, None], rows, q, phi)[0]
    assert value <= dual(grid, rows, q, phi).min() + 1e-5
    # The direction lowers the constraint as fast as asked.
    direction = -(rows.T @ tasks + float(found.constraint) * q)
    assert direction @ q <= -phi * (q @ q) + 1e-4


def test_no_constraint_left_is_the_shortest_combination():
    found = bilevel.forum_weights(f32([[1, 0], [0, 4]]), jnp.zeros(2), jnp.array(0.0))
    np.testing.assert_allclose(found.tasks, [0.8, 0.2], atol=1e-5)
    assert float(found.constraint) == 0


RNG = np.random.default_rng(2)
CURVES = RNG.uniform(0.5, 2, size=(2, 3))
TRAIN, VALID = RNG.normal(size=(2, 2, 3))
X = RNG.normal(size=3)


def loss_fn(x, centres):
    return jnp.sum(f32(CURVES) * jnp.square(x[None] - centres), 1) / 2


def test_update_by_hand():
    """First derivatives only: the end of the inner path counts as a constant."""
    phi, rate, steps = 2.0, 0.2, 4
    method = bilevel.forum(
        loss_fn, inner_rate=rate, inner_steps=steps, phi=phi, tx=optax.sgd(0.5)
    )
    grads, state, info = jax.jit(method.update)(
        f32(X), method.init(2), f32(TRAIN), f32(VALID)
    )
    w = np.array([0.5, 0.5])
    end = X.copy()
    for _ in range(steps):
        end = end - rate * w @ (CURVES * (end - TRAIN))

    def losses(x):
        return (CURVES * (x - TRAIN) ** 2).sum(1) / 2

    q_lower = w @ (CURVES * (X - TRAIN))
    q_upper = (np.diag(w) - np.outer(w, w)) @ (losses(X) - losses(end))
    rows = CURVES * (X - VALID)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    q = np.concatenate([q_upper, q_lower])
    full = np.concatenate([np.zeros((2, 2)), rows], 1)
    share = np.linspace(0, 1, 20001)
    grid = np.stack([share, 1 - share])
    tasks = grid[:, dual(grid, full, q, phi).argmin()]
    nu = max(phi - q @ full.T @ tasks / (q @ q), 0)
    assert nu > 0
    np.testing.assert_allclose(state.method, tasks, atol=2e-3)
    np.testing.assert_allclose(grads, tasks @ rows + nu * q_lower, atol=5e-3)
    np.testing.assert_allclose(info.hypergradient, nu * q_upper, atol=2e-3)
    np.testing.assert_allclose(state.upper, -0.5 * nu * q_upper, atol=2e-3)


def test_weights_are_averaged_over_steps():
    method = bilevel.forum(loss_fn)
    first = method.init(2)._replace(method=f32([1, 0]), step=jnp.int32(15))
    _, state, _ = method.update(f32(X), first, f32(TRAIN), f32(VALID))
    start = method.init(2)
    _, alone, _ = method.update(f32(X), start, f32(TRAIN), f32(VALID))
    share = 16**-0.75
    np.testing.assert_allclose(
        state.method, (1 - share) * f32([1, 0]) + share * alone.method, rtol=1e-5
    )


def test_lowers_both_validation_losses():
    method = bilevel.forum(loss_fn, inner_steps=3)
    x, state = f32(X) + 3, method.init(2)
    update = jax.jit(method.update)
    start = loss_fn(x, f32(VALID))
    for _ in range(40):
        grads, state, info = update(x, state, f32(TRAIN), f32(VALID))
        x = x - 0.05 * grads
    assert (loss_fn(x, f32(VALID)) < start).all()
    assert bool(info.finite)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phi": 0.0}, "phi is 0.0"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        bilevel.forum(loss_fn, **options)


def test_products_are_in_full_float32_on_accelerators():
    lowered = jax.jit(bilevel.forum_weights).lower(jnp.eye(3), jnp.ones(3), f32(2))
    products = [
        line for line in lowered.as_text().splitlines() if "dot_general" in line
    ]
    assert products and all("[HIGHEST, HIGHEST]" in line for line in products)
