"""DOP against its distances, differentiated by differences and stepped in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, shape=(4, 3)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(x, **options):
    return np.asarray(merging.dop({"w": jnp.asarray(x, jnp.float32)}, **options)["w"])


def distance(merged, goal, spaces, energy):
    """|S U^T (X - Y)|^2 + |(X - Y) V S|^2 over the leading directions of Y."""
    u, s, vt = np.linalg.svd(goal, full_matrices=False)
    rank = int(np.searchsorted(np.cumsum(s) / s.sum(), energy - 1e-9)) + 1
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    gap = merged - goal
    left = ((s[:, None] * (u.T @ gap)) ** 2).sum() if "u" in spaces else 0.0
    right = (((gap @ vt.T) * s) ** 2).sum() if "v" in spaces else 0.0
    return left + right


def slope(merged, *args):
    out = np.zeros_like(merged)
    for at in np.ndindex(merged.shape):
        step = np.zeros_like(merged)
        step[at] = 1e-5
        out[at] = (
            distance(merged + step, *args) - distance(merged - step, *args)
        ) / 2e-5
    return out


def shortest(g, h):
    """Share of g in the shortest convex combination with h."""
    gap = ((g - h) ** 2).sum()
    return float(np.clip(((h - g) * h).sum() / gap, 0, 1)) if gap else 0.5


def oracle(x, steps, rate, energy, alpha, beta, spaces):
    total = x[0]
    for new in x[1:]:
        merged, shares = (total + new) / 2, np.array([alpha, 1 - alpha])
        mean = square = 0.0
        for i in range(1, steps + 1):
            losses = [distance(merged, y, spaces, energy) for y in (total, new)]
            g, h = (slope(merged, y, spaces, energy) for y in (total, new))
            share = shortest(g / losses[0], h / losses[1])
            shares = beta * shares + (1 - beta) * np.array([share, 1 - share])
            whole = shares[0] * g + shares[1] * h
            mean, square = 0.9 * mean + 0.1 * whole, 0.999 * square + 0.001 * whole**2
            corrected = np.sqrt(square / (1 - 0.999**i)) + 1e-8
            merged = merged - rate * mean / (1 - 0.9**i) / corrected
        total = merged
    return total


@pytest.mark.parametrize(
    ("spaces", "energy", "beta"),
    [("uv", 0.99999, 0.5), ("u", 0.6, 0.0), ("v", 1.0, 1.0)],
)
def test_matches_the_method(spaces, energy, beta):
    x = draw(0)
    options = {"energy": energy, "alpha": 0.7, "beta": beta, "spaces": spaces}
    got = run(x, steps=10, learning_rate=0.02, **options)
    want = oracle(x, 10, 0.02, **options)
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert np.abs(want - oracle(x, 0, 0.02, **options)).max() > 0.05


def test_identities():
    x = draw(1, 2)
    assert np.array_equal(run(x[:1]), np.float32(x[0]))
    options = {"steps": 5, "alpha": 0.5, "learning_rate": 0.1}
    same = run(np.stack([x[0], x[0]]), **options)
    np.testing.assert_allclose(same, x[0], atol=1e-5)
    assert not run(0 * x, **options).any()
    pair = run(np.stack([x[0], -x[0]]), **options)
    np.testing.assert_allclose(pair, 0 * pair, atol=1e-4)


def test_alpha_decides_between_the_tasks():
    x = draw(2, 2)
    for t, alpha in enumerate((1.0, 0.0)):
        got = run(x, alpha=alpha, steps=300, learning_rate=0.01, beta=1.0)
        near, far = (np.linalg.norm(got - x[k]) for k in (t, 1 - t))
        assert near < 0.4 * far


def test_tasks_that_share_nothing_are_both_kept():
    x = np.zeros((2, 4, 4))
    x[0, :2, :2] = [[2.0, 0.5], [0.0, 1.0]]
    x[1, 2:, 2:] = [[1.0, 0.0], [1.0, 2.0]]
    got = run(x, steps=300, learning_rate=0.01, alpha=0.5)
    np.testing.assert_allclose(got, x.sum(0), atol=0.05)


def test_trees_stacks_and_jit():
    x = draw(3, 2, (2, 3, 4))
    taus = {
        "layers": jnp.asarray(x, jnp.float32),
        "bias": jnp.array([[1.0], [3.0]]),
        "half": jnp.asarray(x[:, 0], jnp.bfloat16),
    }

    def f(taus):
        return merging.dop(
            taus, steps=8, learning_rate=0.05, matrices=lambda name, s: len(s) > 1
        )

    got = jax.jit(f)(taus)
    assert got["bias"].tolist() == [2.0] and got["half"].dtype == jnp.bfloat16
    for i in range(2):  # Layers of a stack are balanced one by one.
        alone = run(x[:, i], steps=8, learning_rate=0.05)
        np.testing.assert_allclose(got["layers"][i], alone, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"beta": "x"}, "beta is 'x', wanted a number"),
        ({"spaces": "w"}, "spaces is 'w'"),
        ({"svd": "sketch"}, "svd is 'sketch'"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"dop: .*{message}"):
        run(draw(0), **options)
