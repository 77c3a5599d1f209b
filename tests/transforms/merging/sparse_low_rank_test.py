"""SparseLo: alternating projections against NumPy, and what they must not lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed=0, tasks=2, shape=(8, 6)):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(tasks, *shape))
    mask = rng.uniform(size=w.shape) < 0.3
    return w, mask


def definition(w, mask, rank, steps):
    sparse = np.where(mask, w, 0)
    for step in range(steps + 1):
        u, s, vt = np.linalg.svd(w - sparse)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
        if step < steps:
            sparse = np.where(mask, w - low, 0)
    return sparse, low


def parts(found, name="w"):
    low = np.stack([a[name]["a"] @ a[name]["b"] for a in found.adapters])
    return np.asarray(found.sparse[name]), low


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_equals_its_definition(steps):
    w, mask = draw()
    taus = {"w": jnp.asarray(w, jnp.float32), "b": jnp.ones((2, 3))}
    masks = {"w": jnp.asarray(mask), "b": jnp.zeros((2, 3), bool)}
    found = merging.sparse_low_rank(taus, masks, rank=2, steps=steps)
    sparse, low = parts(found)
    for t in range(2):
        want = definition(w[t], mask[t], 2, steps)
        np.testing.assert_allclose(sparse[t], want[0], atol=1e-5)
        np.testing.assert_allclose(low[t], want[1], atol=1e-5)
    np.testing.assert_array_equal(found.sparse["b"], taus["b"])
    assert set(found.adapters[0]) == {"w"}


def test_steps_lose_less_and_find_what_is_a_sum():
    rng = np.random.default_rng(1)
    low = rng.normal(size=(1, 24, 2)) @ rng.normal(size=(1, 2, 20))
    mask = rng.uniform(size=low.shape) < 0.05
    w = low + 5 * mask * rng.normal(size=low.shape)
    taus, masks = {"w": jnp.asarray(w, jnp.float32)}, {"w": jnp.asarray(mask)}
    losses = []
    for steps in (0, 1, 4, 100):
        found = merging.sparse_low_rank(taus, masks, rank=2, steps=steps)
        losses.append(np.linalg.norm(w - sum(parts(found))))
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[3] < 1e-3 * losses[0]


def test_whole_and_empty_masks_dtype_and_jit():
    w, _ = draw(2)
    taus = {"w": jnp.asarray(w, jnp.bfloat16)}
    whole = merging.sparse_low_rank(
        taus, {"w": jnp.ones(w.shape, bool)}, rank=1, steps=2
    )
    np.testing.assert_array_equal(parts(whole)[1], 0)
    np.testing.assert_array_equal(whole.sparse["w"], taus["w"])
    split = jax.jit(lambda t, m: merging.sparse_low_rank(t, m, rank=9, steps=1))
    none = split(taus, {"w": jnp.zeros(w.shape, bool)})
    assert none.sparse["w"].dtype == none.adapters[0]["w"]["a"].dtype == jnp.bfloat16
    assert not none.sparse["w"].any()
    np.testing.assert_allclose(parts(none)[1], w, atol=0.05)


def test_errors():
    w, mask = draw()
    taus, masks = {"w": jnp.asarray(w, jnp.float32)}, {"w": jnp.asarray(mask)}
    with pytest.raises(ValueError, match="sparse_low_rank: rank is 0 and steps 0"):
        merging.sparse_low_rank(taus, masks, rank=0)
    with pytest.raises(ValueError, match="sparse_low_rank: 'w' is .* in masks"):
        merging.sparse_low_rank(taus, {"w": jnp.ones(w.shape)}, rank=1)
    flat = {"w": jnp.ones((2, 3))}, {"w": jnp.ones((2, 3), bool)}
    with pytest.raises(ValueError, match="sparse_low_rank: no leaf of taus is a matri"):
        merging.sparse_low_rank(*flat, rank=1)
