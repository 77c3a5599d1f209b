"""Prefill and decode steps through a cache are the forward pass over everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

SIZES = {
    "vocab_size": 13,
    "width": 8,
    "depth": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 12,
    "max_positions": 16,
}
FAMILIES = {
    "llama": {},
    "one-kv": {"num_kv_heads": 1, "head_dim": 6},
    "window": {"windows": (3,), "attention_softcap": 2.0},
    "alternating": {"windows": (2, 0), "post_norms": True},
    "learned": {"position": "learned", "norm": "layer", "gated": False},
    "experts": {"num_experts": 4, "experts_per_token": 2, "qk_norm": "projection"},
    "blocked": {"attention": "blocked", "windows": (3, 0)},
    "fused": {"attention": "fused"},
}
IDS = np.random.default_rng(0).integers(0, 13, (3, 10)).astype(np.int32)
LENGTHS = np.array([5, 1, 3])


def tiny(family="llama", **options):
    return models.Decoder(**{**SIZES, **FAMILIES[family], **options})


def step_of(module, params):
    """One compiled function of (tokens, cache[, segments])."""

    @jax.jit
    def step(ids, cache, segments=None):
        return module.apply({"params": params}, ids, segments, cache=cache)

    return step


def prepared(fill, family, scan):
    params = fill(tiny(family), IDS)
    module = tiny(family, scan=scan)
    return module, models.stack_layers(params) if scan else params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prefill_and_steps_are_the_full_forward(fill, family, scan):
    module, params = prepared(fill, family, scan)
    full = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    step = step_of(module, params)

    prompt = IDS[:, :5] * (np.arange(5) < LENGTHS[:, None])
    segments = (np.arange(5) < LENGTHS[:, None]).astype(np.int32)
    cache = models.init_cache(module, 3, 12)
    logits, cache = step(prompt, cache, segments)
    np.testing.assert_array_equal(cache["length"], LENGTHS)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            logits[b, :length], full[b, :length], atol=1e-4, rtol=1e-4
        )
    shapes = jax.tree.map(jnp.shape, cache)
    for n in range(5):
        at = LENGTHS + n
        logits, cache = step(IDS[np.arange(3), at][:, None], cache)
        np.testing.assert_allclose(
            logits[:, 0], full[np.arange(3), at], atol=1e-4, rtol=1e-4
        )
    np.testing.assert_array_equal(cache["length"], LENGTHS + 5)
    assert jax.tree.map(jnp.shape, cache) == shapes
    # The prefill and one step for all positions.
    assert step._cache_size() == 2


@pytest.mark.parametrize("scan", [False, True])
def test_a_prompt_may_come_in_pieces(fill, scan):
    module, params = prepared(fill, "alternating", scan)
    full = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    step = step_of(module, params)
    cache, found = models.init_cache(module, 3, 10), []
    for piece in (slice(0, 4), slice(4, 7), slice(7, 10)):
        logits, cache = step(IDS[:, piece], cache)
        found.append(logits)
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), full, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("scan", [False, True])
def test_rows_at_rest_neither_write_nor_move(fill, scan):
    module, params = prepared(fill, "llama", scan)
    step = step_of(module, params)
    _, cache = step(IDS[:, :4], models.init_cache(module, 3, 8))
    rest = np.array([[1], [0], [1]], np.int32)
    _, moved = step(IDS[:, 4:5], cache, rest)
    np.testing.assert_array_equal(moved["length"], [5, 4, 5])
    axis = 1 if scan else 0
    for name, part in cache.items():
        if name != "length":
            for kind, old in part.items():
                new = moved[name][kind]
                np.testing.assert_array_equal(
                    np.take(np.asarray(new), 1, axis), np.take(np.asarray(old), 1, axis)
                )
                assert not np.array_equal(new, old)


@pytest.mark.parametrize("scan", [False, True])
def test_rows_that_overflow_are_nan_and_others_are_not(fill, scan):
    module, params = prepared(fill, "llama", scan)
    step = step_of(module, params)
    segments = (np.arange(6) < np.array([[6], [5], [2]])).astype(np.int32)
    _, cache = step(IDS[:, :6], models.init_cache(module, 3, 6), segments)
    logits, cache = step(IDS[:, 6:7], cache)
    np.testing.assert_array_equal(
        np.isnan(logits).any(axis=(1, 2)), [True, False, False]
    )
    logits, _ = step(IDS[:, 7:8], cache)
    np.testing.assert_array_equal(
        np.isnan(logits).any(axis=(1, 2)), [True, True, False]
    )


def test_a_half_precision_cache_stays_near_and_keeps_its_dtype(fill):
    module, params = prepared(fill, "llama", True)
    full = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    step = step_of(module, params)
    _, cache = step(IDS[:, :9], models.init_cache(module, 3, 10, jnp.bfloat16))
    logits, cache = step(IDS[:, 9:], cache)
    assert cache["layers"]["key"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=0.2)


def test_reordered_rows_go_on_as_the_rows_they_were(fill):
    module, params = prepared(fill, "llama", True)
    step = step_of(module, params)
    _, cache = step(IDS[:, :4], models.init_cache(module, 3, 8))
    rows = jnp.array([2, 0, 0])
    got, _ = step(IDS[rows, 4:5], models.reorder_cache(cache, rows))
    want, _ = step(IDS[:, 4:5], cache)
    np.testing.assert_allclose(got, want[rows], atol=1e-6)


def test_steps_run_inside_one_loop(fill):
    """The cache keeps its structure, so a `while_loop` can carry it."""
    module, params = prepared(fill, "window", True)

    @functools.partial(jax.jit, static_argnames="steps")
    def generate(ids, steps):
        logits, cache = module.apply(
            {"params": params}, ids, cache=models.init_cache(module, 3, 12)
        )
        token = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)

        def body(carry, _):
            token, cache = carry
            logits, cache = module.apply(
                {"params": params}, token[:, None], cache=cache
            )
            following = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            return (following, cache), token

        return jax.lax.scan(body, (token, cache), length=steps)[1].T

    got = generate(IDS[:, :4], 5)
    ids = IDS[:, :4]
    run = jax.jit(lambda ids: module.apply({"params": params}, ids))
    for n in range(5):
        padded = np.zeros((3, 9), np.int32)  # Causal: what follows does not matter.
        padded[:, : 4 + n] = ids
        best = np.argmax(run(padded)[:, 3 + n], axis=-1).astype(np.int32)
        np.testing.assert_array_equal(got[:, n], best)
        ids = np.concatenate([ids, best[:, None]], axis=1)
