import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import weighting

GRADS = {"w": jnp.array([[1.0, 0.0], [0.5, 2.0]])}
HISTORY = jnp.array([[1.0, 2.0], [0.9, 1.0], [0.8, 0.7], [0.7, 0.6]])


def run(tx):
    state = tx.init(None)
    update = jax.jit(tx.update)
    out = []
    for losses in HISTORY:
        updates, state = update(GRADS, state, losses=losses)
        out.append(updates["w"])
    return np.stack(out), state


def manual(method, tx, after):
    """The same by hand, with the next batch's losses as those after the step."""
    params, state = method.init(2)
    opt_state = tx.init(params)
    out, norms = [], jnp.linalg.norm(GRADS["w"], axis=1)
    for step, losses in enumerate(HISTORY):
        w, g = jax.grad(method.loss, (0, 1))(losses, params, state)
        out.append(w @ GRADS["w"])
        updates, opt_state = tx.update(g, opt_state, params)
        params = optax.apply_updates(params, updates)
        if step + 1 < len(HISTORY):
            more = {"after": HISTORY[step + 1]} if after else {}
            state = method.update(state, losses, norms=norms, **more)
    return np.stack(out)


@pytest.mark.parametrize(
    ("make", "after"),
    [
        (weighting.uncertainty, False),
        (lambda: weighting.dwa(1), False),
        (weighting.grad_norm, False),
        (weighting.famo, True),
        (weighting.random, False),
    ],
    ids=["uncertainty", "dwa", "grad_norm", "famo", "random"],
)
def test_equals_the_weighting_by_hand(make, after):
    tx = optax.sgd(0.1)
    got, state = run(weighting.as_aggregator(make(), 2, tx=tx))
    np.testing.assert_allclose(got, manual(make(), tx, after), rtol=1e-5)
    assert bool(state.finite)


def test_default_optimizer_learns():
    _, state = run(weighting.as_aggregator(weighting.uncertainty(), 2))
    assert (state.method.params["log_variance"] != 0).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bad", "present"), [(-1.0, None), (0.0, jnp.ones(2, bool))], ids=["below", "zero"]
)
def test_forbidden_losses_stop_the_step(bad, present):
    tx = weighting.as_aggregator(weighting.geometric_mean(), 2)
    update = jax.jit(tx.update)
    losses = jnp.array([1.0, bad])
    updates, state = update(GRADS, tx.init(None), losses=losses, present=present)
    assert np.isnan(updates["w"]).all() and not bool(state.finite)
    updates, state = update(GRADS, state, losses=jnp.ones(2))
    assert np.isfinite(updates["w"]).all() and bool(state.finite)


@pytest.mark.fast
def test_what_the_batch_says_goes_before_zero_losses():
    tx = weighting.as_aggregator(weighting.mean(), 2)
    losses = jnp.array([0.0, 2.0])
    for present, want in ((None, [0, 1]), ([1, 1], [0.5, 0.5]), ([1, 0], [1, 0])):
        extra = {} if present is None else {"present": jnp.array(present) > 0}
        weights, _ = tx.rule.weigh(
            jnp.zeros((2, 2)), tx.rule.init(), losses=losses, **extra
        )
        assert weights.tolist() == want


@pytest.mark.fast
def test_reads_what_it_needs():
    reads = {
        make.__name__: weighting.as_aggregator(make(), 2).rule.reads
        for make in (weighting.grad_norm, weighting.famo, weighting.uncertainty)
    }
    assert reads.pop("grad_norm") == ("gram", "losses")
    assert set(reads.values()) == {("losses",)}


def test_learns_from_the_losses_after_the_step_when_told():
    """Told so, the stand-in of the next batch is not used."""
    method = weighting.famo()
    tx = weighting.as_aggregator(method, 2)
    state, (params, want) = tx.rule.init(), method.init(2)
    for losses in HISTORY:
        weights, state = tx.rule.weigh(jnp.zeros((2, 2)), state, losses=losses)
        np.testing.assert_allclose(weights, method.weights(losses, params, want))
        after = losses * jnp.array([0.5, 1.1])
        state = tx.rule.after(state, after)
        want = method.update(want, losses, after=after)
    np.testing.assert_allclose(state.weighting.method.logits, want.method.logits)


@pytest.mark.parametrize(
    "make",
    [
        weighting.famo,
        weighting.geometric_mean,
        weighting.grad_norm,
        weighting.imtl_l,
        weighting.uncertainty,
        lambda: weighting.dwa(1),
    ],
    ids=["famo", "geometric_mean", "grad_norm", "imtl_l", "uncertainty", "dwa"],
)
def test_a_task_without_loss_and_gradient_is_absent(make):
    """Its weight is zero and the method learns what it would without it."""
    method, tx = make(), optax.sgd(0.1)
    aggregator = weighting.as_aggregator(method, 2, tx=tx)
    update = jax.jit(aggregator.update)
    absent = {"w": GRADS["w"].at[1].set(0)}
    losses = jnp.array([[1.0, 2.0], [0.9, 0.0], [0.8, 0.7]])
    present = losses > 0
    norms = jnp.where(present, jnp.linalg.norm(GRADS["w"], axis=1), 0)
    after = jnp.array([[0.9, 2.0], [0.8, 0.7], [1.0, 1.0]])

    got, state = [], aggregator.init(None)
    params, by_hand = method.init(2)
    for step, now in enumerate(losses):
        grads = absent if step == 1 else GRADS
        updates, state = update(grads, state, losses=now)
        got.append(updates["w"])
        w, g = jax.grad(method.loss, (0, 1))(now, params, by_hand, present[step])
        np.testing.assert_allclose(got[-1], w @ GRADS["w"], rtol=1e-5)
        assert bool(state.finite) and (present[step, 1] or w[1] == 0)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, g)
        more = {"after": after[step], "norms": norms[step]}
        by_hand = method.update(by_hand, now, present[step], **more)


def test_needs_losses():
    tx = weighting.as_aggregator(weighting.mean(), 2)
    with pytest.raises(ValueError, match="as_aggregator: the update needs `losses`"):
        tx.update(GRADS, tx.init(None))
