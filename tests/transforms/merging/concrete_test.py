"""Masks of a concrete distribution: their law, their slopes and what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import merging


def draw(seed, T=2):
    rng = np.random.default_rng(seed)
    base = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    taus = {k: rng.normal(size=(T, *x.shape)) for k, x in base.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (base, taus))


def loss_fn(params, batch, task, args):
    del task, args
    return sum(jnp.sum((params[k] - batch[k]) ** 2) for k in params)


def goals(base, taus, keep, steps, coeffs=0.5):
    """The merge of which the entries in `keep` survive, over and over."""
    goal = {
        k: base[k] + jnp.where(keep[k], coeffs * taus[k].sum(0), 0) / keep[k].mean()
        for k in base
    }
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, 1, *x.shape)), goal)


def test_masks_have_the_law_of_the_concrete_distribution():
    logits, temperature = jnp.full(40000, 0.4), 0.5
    mask = merging.concrete_mask({"w": logits}, key=jax.random.key(0))["w"]
    mask = np.asarray(mask, float)
    np.testing.assert_allclose(mask.mean(), 1, rtol=1e-4)
    mask = mask / mask.max()
    # P(m < x) = sigmoid(temperature logit(x) - logit), Maddison et al. 2017.
    for x in (0.2, 0.5, 0.8):
        chance = 1 / (1 + np.exp(0.4) * ((1 - x) / x) ** temperature)
        assert abs((mask < x).mean() - chance) < 0.02
    sampled = merging.concrete_mask(
        {"w": logits}, key=jax.random.key(1), kind="sampled"
    )
    kept = np.asarray(sampled["w"]) > 0
    assert abs(kept.mean() - 1 / (1 + np.exp(-0.4))) < 0.02
    np.testing.assert_allclose(
        np.asarray(sampled["w"])[kept], 1 / kept.mean(), rtol=1e-4
    )
    none = merging.concrete_mask(
        {"w": logits - 100}, key=jax.random.key(1), kind="sampled"
    )
    assert not none["w"].any()


def test_equal_leaves_draw_masks_of_their_own():
    logits = {"a": jnp.zeros(8), "b": jnp.zeros(8)}
    mask = merging.concrete_mask(logits, key=jax.random.key(0))
    assert (mask["a"] != mask["b"]).all()


@pytest.mark.parametrize("kind", ["relaxed", "sampled", "mean"])
def test_saturated_masks_are_task_arithmetic_and_none(kind):
    _, taus = draw(0)
    coeffs = {"a": jnp.array([0.5, 0.2]), "b": jnp.array([0.1, 0.0])}
    learned = merging.Concrete(
        {"a": jnp.full((3, 2), 99.0), "b": jnp.full(4, 99.0)}, coeffs, None
    )
    got = merging.concrete_merge(taus, learned, key=jax.random.key(0), kind=kind)
    want = merging.combine(taus, coeffs)
    for k in taus:
        np.testing.assert_allclose(got[k], want[k], atol=1e-5)


@pytest.fixture(scope="module")
def learned():
    base, taus = draw(1)
    keep = {"a": jnp.arange(6).reshape(3, 2) % 2 == 0, "b": jnp.arange(4) < 1}
    batches = goals(base, taus, keep, 120)
    found = merging.concrete(
        base, taus, loss_fn, batches, key=jax.random.key(0), coeffs=0.5,
        tx=optax.adam(0.1),
    )  # fmt: skip
    return keep, found


def test_learns_which_entries_to_keep(learned):
    keep, found = learned
    for k, inside in keep.items():
        logits = np.asarray(found.logits[k])
        assert logits[np.asarray(inside)].min() > logits[~np.asarray(inside)].max()
    assert found.losses.shape == (120, 1)
    assert found.losses[-20:].mean() < 0.5 * found.losses[:20].mean()
    # Coefficients are not learned unless an optimizer for them is given.
    assert all((row == 0.5).all() for row in found.coeffs.values())


def test_first_step_is_the_slope_of_the_loss_at_the_draw():
    base, taus = draw(2)
    keep = {"a": jnp.ones((3, 2), bool), "b": jnp.arange(4) < 2}
    batches = goals(base, taus, keep, 1)
    key = jax.random.key(3)
    got = merging.concrete(
        base, taus, loss_fn, batches, key=key, coeffs=0.5, tx=optax.sgd(1.0)
    )
    own = jax.random.split(key, 1)[0]
    for i, k in enumerate(sorted(base)):
        noise = np.asarray(
            jax.random.logistic(jax.random.fold_in(own, i), base[k].shape), float
        )
        soft = 1 / (1 + np.exp(-noise / 0.5))
        tau = 0.5 * np.asarray(taus[k], float).sum(0)
        theta = np.asarray(base[k], float) + soft / soft.mean() * tau
        slope = 2 * (theta - np.asarray(batches[k][0, 0], float)) * tau
        # Of m / mean(m) along m, then of m along the logit.
        inner = (
            slope / soft.mean() - (slope * soft).sum() / soft.size / soft.mean() ** 2
        )
        want = -inner * soft * (1 - soft) / 0.5
        np.testing.assert_allclose(got.logits[k], want, rtol=2e-3, atol=2e-4)


def test_masks_are_judged_one_step_of_the_coefficients_from_where_they_start():
    base, taus = draw(4)
    keep = jax.tree.map(lambda x: jnp.ones(x.shape, bool), base)
    batches, key, rate = goals(base, taus, keep, 4), jax.random.key(0), 0.05
    options = {"key": key, "coeffs": 0.0}
    own = {"coeffs_tx": optax.sgd(rate), **options}
    moved = merging.concrete(base, taus, loss_fn, batches, tx=optax.sgd(0.1), **own)
    # At the coefficients themselves, 0, the mask would have no slope.
    assert all(x.all() for x in moved.logits.values())
    # A mask that stays shows where each step's coefficients came from.
    still = merging.concrete(base, taus, loss_fn, batches, tx=optax.sgd(0.0), **own)
    assert all(not row.any() for row in still.coeffs.values())
    for step, each in enumerate(jax.random.split(key, 4)):
        mask, want = merging.concrete_mask(still.logits, key=each), 0.0
        for k in base:
            tau = np.asarray(mask[k], float) * np.asarray(taus[k], float)
            gap = np.asarray(base[k], float) - np.asarray(batches[k][step, 0], float)
            coeffs = -rate * 2 * (gap * tau).reshape(len(tau), -1).sum(1)
            want += ((gap + np.tensordot(coeffs, tau, 1)) ** 2).sum()
        np.testing.assert_allclose(still.losses[step, 0], want, rtol=1e-3)


def moved_loss(params, batch, task, args):
    """Of inputs, and of inputs that the noise has moved."""
    del args
    weight, noise = task
    own = jnp.sum((params["a"] - batch) ** 2)
    return weight * (own + 0.5 * jnp.sum((params["a"] - batch - noise) ** 2))


def adversary_loss(params, noise, batch, task, args):
    del args
    return -task * jnp.sum((params["a"] - batch - noise) ** 2)


@pytest.mark.parametrize("inner", [False, True])
def test_an_adversary_moves_first_in_every_step(inner):
    rng = np.random.default_rng(5)
    base = {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    taus = {"a": jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)}
    batches = jnp.asarray(rng.normal(size=(4, 2, 3, 2)), jnp.float32)
    tasks, key = jnp.array([1.0, 2.0]), jax.random.key(3)
    noise = jnp.asarray(0.1 * rng.normal(size=(2, 3, 2)), jnp.float32)
    found = merging.concrete(
        base, taus, moved_loss, batches, key=key, tasks=tasks,
        coeffs_tx=optax.sgd(0.01) if inner else None, tx=optax.sgd(0.2),
        adversary=merging.Adversary(adversary_loss, noise, optax.sgd(0.05)),
    )  # fmt: skip
    logits, start = jnp.zeros((3, 2)), {"a": jnp.full(2, 0.3)}
    for batch, own in zip(batches, jax.random.split(key, 4), strict=True):

        def model(logits, coeffs, own=own):
            learned = merging.Concrete({"a": logits}, coeffs, None)
            delta = merging.concrete_merge(taus, learned, key=own)
            return {"a": base["a"] + delta["a"]}

        def total(logits, coeffs, noise, batch=batch, model=model):
            params = model(logits, coeffs)
            return sum(
                moved_loss(params, batch[t], (tasks[t], noise[t]), None)
                for t in range(2)
            )

        coeffs = start
        if inner:
            slope = jax.grad(total, 1)(logits, start, noise)
            coeffs = jax.tree.map(lambda c, g: c - 0.01 * g, start, slope)
        params = model(logits, coeffs)
        slopes = [
            jax.grad(adversary_loss, 1)(params, noise[t], batch[t], tasks[t], None)
            for t in range(2)
        ]
        noise = noise - 0.05 * jnp.stack(slopes)
        logits = logits - 0.2 * jax.grad(total)(logits, coeffs, noise)
    np.testing.assert_allclose(found.noise, noise, atol=1e-4)
    np.testing.assert_allclose(found.logits["a"], logits, atol=1e-4)


def test_without_tasks_an_adversary_has_noise_alone_and_it_must_be_finite():
    base, taus = {"a": jnp.zeros(2)}, {"a": jnp.ones((1, 2))}

    def loss(params, batch, task, args):
        del args
        assert task[0] is None
        return jnp.sum((params["a"] - batch - task[1]) ** 2)

    def against(params, noise, batch, task, args):
        del task, args
        return -jnp.sum((params["a"] - batch - noise) ** 2)

    batches, tx = jnp.ones((3, 1, 2)), optax.sgd(0.1)
    found = merging.concrete(
        base, taus, loss, batches, key=jax.random.key(0), tx=tx,
        adversary=merging.Adversary(against, jnp.zeros((1, 2)), tx),
    )  # fmt: skip
    assert float(jnp.abs(found.noise).min()) > 0
    with pytest.raises(ValueError, match="concrete: noise"):
        merging.concrete(
            base, taus, loss, batches, key=jax.random.key(0), tx=tx,
            adversary=merging.Adversary(against, jnp.full((1, 2), jnp.nan), tx),
        )  # fmt: skip


def test_integers_and_dtypes_are_kept():
    base = {"w": jnp.ones(2, jnp.bfloat16), "step": jnp.array(3), "none": jnp.zeros(0)}
    taus = {
        "w": jnp.ones((1, 2)),
        "step": jnp.zeros((1,), int),
        "none": jnp.zeros((1, 0)),
    }

    def loss(params, batch, task, args):
        assert params["w"].dtype == jnp.bfloat16
        return (
            jnp.sum(params["w"].astype(jnp.float32))
            * batch
            * params["step"].astype(float)
        )

    found = merging.concrete(base, taus, loss, jnp.ones((2, 1)), key=jax.random.key(0))
    got = merging.concrete_merge(taus, found, kind="mean")
    assert got["step"] == 0 and got["w"].dtype == jnp.float32
    assert found.logits["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"key": 0}, "key is 0"),
        ({"coeffs": np.zeros(3, np.float32)}, r"wanted \(2,\)"),
        ({"logits": {"a": jnp.zeros((3, 2))}}, "'b' is in base but not in the logits"),
        ({"logits": {"a": jnp.zeros((3, 2)), "b": jnp.zeros(5)}}, "'b' is"),
    ],
)
def test_refuses_by_name(options, message):
    base, taus = draw(0)
    options = {"key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=f"concrete: .*{message}"):
        merging.concrete(base, taus, loss_fn, base, **options)


def test_kinds_and_keys_are_checked():
    with pytest.raises(ValueError, match="concrete_mask: kind is 'hard'"):
        merging.concrete_mask({"w": jnp.zeros(1)}, kind="hard")
    with pytest.raises(ValueError, match="concrete_mask: key is None"):
        merging.concrete_mask({"w": jnp.zeros(1)})
