"""Frank-Wolfe merging against its steps, taken in float64 on full vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

SHAPES = {"a": (3,), "b": (2, 2)}


def draw(seed, T=3, steps=4, tasks=2):
    rng = np.random.default_rng(seed)
    base = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    taus = {k: rng.normal(size=(T, *s)) for k, s in SHAPES.items()}
    goals = {k: rng.normal(size=(steps, tasks, *s)) for k, s in SHAPES.items()}
    return base, taus, goals


def loss_fn(params, batch, task, args):
    del task, args
    return sum(jnp.sum((params[k] - batch[k]) ** 2) for k in SHAPES)


def run(base, taus, goals, **options):
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (base, taus, goals))
    return merging.frank_wolfe(single[0], single[1], loss_fn, single[2], **options)


def oracle(base, taus, goals, soft, whole, start, scale, size):
    """The steps, in parameters: corners are models, products are of full vectors."""
    T = len(taus["a"])
    coeffs = {k: np.full(T, start) for k in SHAPES}
    corners = [np.full(T, start), *(scale * np.eye(T))]
    for s in range(len(goals["a"])):
        chosen: dict = {k: [] for k in SHAPES}
        slopes = {}
        for k in SHAPES:
            theta = base[k] + np.tensordot(coeffs[k], taus[k], 1)
            slopes[k] = 2 * (theta[None] - goals[k][s])
        groups = [slice(j, j + 1) for j in range(2)] if soft else [slice(None)]
        for group in groups:
            values = {
                k: [
                    (slopes[k][group].sum(0) * np.tensordot(v, taus[k], 1)).sum()
                    for v in corners
                ]
                for k in SHAPES
            }
            if whole:
                values = dict.fromkeys(SHAPES, np.sum(list(values.values()), 0))
            for k in SHAPES:
                chosen[k].append(corners[int(np.argmin(values[k]))])
        gamma = min(1.0, 2 * size / (s + 2))
        for k in SHAPES:
            coeffs[k] = coeffs[k] + gamma * (np.mean(chosen[k], 0) - coeffs[k])
    return coeffs


@pytest.mark.parametrize("selection", ["hard", "soft"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_matches_the_steps(selection, scope):
    base, taus, goals = draw(0)
    numbers = {"start": 0.2, "scale": 0.5, "step_size": 0.7}
    got = run(base, taus, goals, selection=selection, scope=scope, **numbers)
    want = oracle(
        base, taus, goals, selection == "soft", scope == "global", *numbers.values()
    )
    for k in SHAPES:
        np.testing.assert_allclose(got.coeffs[k], want[k], atol=1e-5)
    first = sum(
        ((base[k] + 0.2 * taus[k].sum(0))[None] - goals[k][0]).reshape(2, -1) ** 2 @ one
        for k, one in (("a", np.ones(3)), ("b", np.ones(4)))
    )
    np.testing.assert_allclose(got.losses[0], first, rtol=1e-4)


def test_reaches_the_best_model_of_the_hull():
    base, taus, _ = draw(1)
    share = np.array([0.6, 0.4, 0.0])
    goal = {k: base[k] + np.tensordot(share, taus[k], 1) for k in SHAPES}
    goals = {k: np.broadcast_to(g, (400, 1, *g.shape)) for k, g in goal.items()}
    got = run(base, taus, goals, scope="global")
    assert got.losses[-1, 0] < 0.02 * got.losses[0, 0]
    for k in SHAPES:
        c = np.asarray(got.coeffs[k])
        np.testing.assert_allclose(c, share, atol=0.1)
        assert (c >= 0).all() and c.sum() <= 1 + 1e-5


def test_irrelevant_and_single_experts():
    base, taus, _ = draw(2, T=1)
    away = {
        k: np.broadcast_to(base[k] - 5 * t[0], (6, 1, *t[0].shape))
        for k, t in taus.items()
    }
    still = run(base, taus, away)  # Any step would be uphill: the start is a corner.
    assert not any(still.coeffs[k].any() for k in SHAPES)
    there = {
        k: np.broadcast_to(base[k] + 5 * t[0], (6, 1, *t[0].shape))
        for k, t in taus.items()
    }
    moved = run(base, taus, there)
    assert all(moved.coeffs[k].tolist() == [1.0] for k in SHAPES)
    assert moved.vertices["a"].shape == (6, 1)


def test_leaves_without_slopes_and_tasks_of_their_own():
    base = {"w": jnp.zeros(2), "unused": jnp.ones(2), "step": jnp.array(3)}
    taus = {"w": jnp.eye(2), "unused": jnp.ones((2, 2)), "step": jnp.zeros((2,), int)}

    def loss(params, batch, task, args):
        return args * jnp.sum((params["w"] - task) ** 2) + 0 * batch

    got = jax.jit(
        lambda base, taus, batches, tasks, args: merging.frank_wolfe(
            base, taus, loss, batches, tasks=tasks, args=args, start=0.25
        )
    )(base, taus, jnp.zeros((5, 2)), 4 * jnp.eye(2)[:, ::-1], jnp.ones(()))
    assert got.coeffs["unused"].tolist() == [0.25, 0.25]
    assert float(got.coeffs["w"].sum()) > 0.9
    assert got.losses.shape == (5, 2)


@pytest.mark.parametrize("selection", ["hard", "soft"])
def test_slopes_that_are_nan_are_seen_in_the_coefficients(selection):
    base, taus = {"w": jnp.ones(2)}, {"w": jnp.eye(2)}

    def loss(params, batch, task, args):
        return jnp.sum(params["w"]) * batch

    batches = jnp.array([[1.0], [jnp.nan], [1.0]])
    got = merging.frank_wolfe(base, taus, loss, batches, selection=selection)
    assert jnp.isnan(got.coeffs["w"]).all()
    assert not jnp.isnan(got.vertices["w"][0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "top"}, "selection is 'top'"),
        ({"scope": "layer"}, "scope is 'layer'"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"scale": "x"}, "scale is 'x', wanted a number"),
        ({"start": np.nan}, "coefficients: .* holds NaN"),
        ({"start": np.zeros(2, np.float32)}, r"wanted \(3,\)"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"frank_wolfe: .*{message}"):
        run(*draw(0), **options)
