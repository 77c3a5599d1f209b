import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.transforms import masking


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "w": array(6, 5).at[0, 0].set(-0.0),
        "b": array(5),
        "frozen": {"x": array(3), "y": array(2, 2)},
        "free": array(4),
    }
    mask = {
        "w": jnp.asarray(rng.random((6, 5)) < 0.5).at[0, 0].set(False),
        "b": jnp.asarray(rng.random(5) < 0.5),
        "frozen": False,
        "free": True,
    }
    return params, mask


def train(tx, params, steps=5, donate=False):
    """Steps on gradients that depend on the parameters; optax mixes dtypes."""

    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(p) + p.dtype.type(0.3), params)
        if isinstance(tx, masking.CompactStep):
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
        state = tx.init(params)
        for _ in range(steps):
            params, state = step(params, state)
    return params, state


def bits(x):
    return np.asarray(x).view(np.uint8)


def active(mask, params):
    """The mask as one array per parameter leaf."""
    full = dict(mask)
    full["frozen"] = jax.tree.map(lambda p: np.zeros(p.shape, bool), params["frozen"])
    full["free"] = np.ones(params["free"].shape, bool)
    return full


def adamw():
    return optax.adamw(0.1, weight_decay=0.1)


FORMS = {
    "keep last": lambda mask: optax.chain(adamw(), masking.keep(mask)),
    "wrap": lambda mask: masking.wrap(adamw(), mask),
    "compact": lambda mask: masking.compact(adamw(), mask),
    "compact_step": lambda mask: masking.compact_step(adamw(), mask),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_inactive_entries_keep_their_bits_under_decay(form, dtype):
    params, mask = problem(dtype)
    after, _ = train(FORMS[form](mask), params)
    for p, q, m in zip(
        *map(jax.tree.leaves, (params, after, active(mask, params))), strict=True
    ):
        p, q, m = np.asarray(p), np.asarray(q), np.asarray(m)
        assert p.dtype == q.dtype
        np.testing.assert_array_equal(bits(p[~m]), bits(q[~m]))
        assert (p[m] != q[m]).all()


@pytest.mark.parametrize("form", ["wrap", "compact", "compact_step"])
def test_active_entries_move_as_without_a_mask(form):
    params, mask = problem()
    after, _ = train(FORMS[form](mask), params)
    plain, _ = train(adamw(), params)
    for p, q, m in zip(
        *map(jax.tree.leaves, (plain, after, active(mask, params))), strict=True
    ):
        m = np.asarray(m)
        np.testing.assert_allclose(np.asarray(p)[m], np.asarray(q)[m], rtol=1e-6)


@pytest.mark.fast
def test_keep_before_decay_does_not_hold_entries_still():
    """Why the order matters: the mutant that masks first must be seen."""
    params, mask = problem()
    after, _ = train(optax.chain(masking.keep(mask), adamw()), params)
    assert (np.asarray(after["w"]) != np.asarray(params["w"])).sum() > mask["w"].sum()


def test_clipping_sees_active_entries_only():
    params, mask = problem()
    grads = jax.tree.map(jnp.ones_like, params)
    clip = optax.clip_by_global_norm(1.0)
    count = sum(int(np.sum(m)) for m in jax.tree.leaves(active(mask, params)))
    for tx in (masking.wrap(clip, mask), masking.compact(clip, mask)):
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["free"], np.full(4, count**-0.5), rtol=1e-5)


def test_nan_outside_the_mask_does_not_leak():
    params, mask = problem()
    grads = jax.tree.map(jnp.ones_like, params)
    grads["frozen"]["x"] = jnp.full(3, jnp.nan)
    grads["w"] = jnp.where(mask["w"], 1.0, jnp.nan)
    for tx in (masking.wrap(optax.clip_by_global_norm(1.0), mask), masking.keep(mask)):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(grads, tx.init(params), params)
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_compact_state_holds_active_entries_only():
    params, mask = problem()
    tx = masking.compact(optax.adam(0.1), mask)
    state = tx.init(params)
    kept = int(mask["w"].sum()) + int(mask["b"].sum()) + 4
    assert sum(m.size for m in state.inner[0].mu) == kept
    assert sum(i.size for i in jax.tree.leaves(state.index)) == kept - 4


def test_compact_step_donates():
    params, mask = problem()
    params = jax.tree.map(jnp.copy, params)
    want, _ = train(masking.wrap(adamw(), mask), params)
    got, state = train(
        masking.compact_step(adamw(), mask), params, steps=1, donate=True
    )
    assert params["w"].is_deleted() and jax.tree.leaves(state)
    del got, want


def test_extra_arguments_reach_the_inner_transformation():
    params, mask = problem()
    seen = []

    def update(updates, state, params=None, *, losses, **extra):
        seen.append(losses)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    for wrapper in (masking.wrap, masking.compact):
        tx = wrapper(inner, mask)
        tx.update(params, tx.init(params), params, losses=3)
    assert seen == [3, 3]


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMS)
def test_bad_masks_are_named(form):
    params, mask = problem()
    name = form.split()[0]
    with pytest.raises(ValueError, match=f"{name}: 'b' of the mask is float32"):
        FORMS[form]({**mask, "b": jnp.ones(5)})
    with pytest.raises(ValueError, match=rf"{name}: 'b' of the mask is \(4,\)"):
        FORMS[form]({**mask, "b": jnp.ones(4, bool)}).init(params)
    with pytest.raises(ValueError, match=f"{name}: the mask must have the structure"):
        FORMS[form]({"w": True}).init(params)


@pytest.mark.fast
def test_compact_refuses_a_traced_mask():
    with pytest.raises(ValueError, match="compact: the mask is traced"):
        jax.jit(lambda m: masking.compact(optax.sgd(0.1), m).init(m))(jnp.ones(3, bool))
