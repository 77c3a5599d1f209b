"""Exact order statistics against a stable sort of the flattened magnitudes."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import _selection, _wide, order

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SHAPES = [(), (1,), (7,), (5, 6), (2, 3, 4), (0,), (3, 0)]


def oracle(values, k):
    """Marks the k largest magnitudes, the first among equals, by a stable sort."""
    flat = np.abs(np.asarray(values, np.float64)).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(values))


def draw(seed, shape, dtype):
    """Few distinct magnitudes, so that ties, also of zeros, are the rule."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-3, 4, shape) * 0.5, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_keeps_exactly_the_k_largest_first_among_equals(shape, dtype):
    x = draw(0, shape, dtype)
    for k in {0, 1, x.size // 2, x.size}:
        np.testing.assert_array_equal(order.top_mask(x, k), oracle(x, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)])
def test_rows_are_independent(shape, dtype):
    x = draw(1, shape, dtype)
    for k in (0, 2, shape[-1]):
        rows = [oracle(r, k) for r in np.asarray(x).reshape(-1, shape[-1])]
        want = np.stack(rows).reshape(shape)
        np.testing.assert_array_equal(order.top_mask(x, k, rows=True), want)


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(0, 31))
def test_tree_is_one_long_vector(seed, k):
    tree = {
        "a": draw(seed, (4, 5), jnp.float32),
        "b": draw(seed + 1, (7,), jnp.bfloat16),
        "c": draw(seed + 2, (), jnp.float16),
        "d": jnp.zeros((0, 3)),
    }
    flat = np.concatenate(
        [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)]
    )
    mask = jax.jit(order.tree_top_mask)(tree, k)
    got = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(mask)])
    np.testing.assert_array_equal(got, oracle(flat, k))


def test_radix_and_bisection_agree_bit_for_bit():
    x = jax.random.normal(jax.random.key(0), (3, 40, 50))
    y = jnp.round(x * 4) / 4
    for leaves in ([x], [y], [x, y[:, :7]]):
        for k in (0, 1, 900, 2000):
            ks = _wide.wide(jnp.full(3, k, jnp.uint32))
            radix = _selection.radix(leaves, ks, "tasks")
            bisect = _selection.bisect(leaves, ks, "tasks")
            jax.tree.map(np.testing.assert_array_equal, radix, bisect)


@pytest.mark.slow
def test_slices_and_one_pass_agree(monkeypatch):
    x = {"w": draw(2, (3, 16, 12), jnp.float32), "b": draw(3, (3, 40), jnp.bfloat16)}
    whole = jax.jit(lambda x: order.task_top_cutoffs(x, 50))(x)
    monkeypatch.setattr(_selection, "_SLICE", 16)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    assert _selection._num_slices(x["w"]) > 2
    sliced = jax.jit(lambda x: order.task_top_cutoffs(x, 50))(x)
    masks = [
        jax.tree.map(lambda a, c: jax.vmap(order.reaches)(a, c), x, cutoffs)
        for cutoffs in (whole, sliced)
    ]
    jax.tree.map(np.testing.assert_array_equal, *masks)
    for t in range(3):
        flat = np.concatenate([np.asarray(x[k][t], np.float32).ravel() for k in "bw"])
        got = np.concatenate([np.asarray(masks[1][k][t]).ravel() for k in "bw"])
        np.testing.assert_array_equal(got, oracle(flat, 50))
    jax.clear_caches()


def test_denormals_are_ordered():
    x = jnp.array([1e-40, 3e-40, 0.0, 2e-40], jnp.float32)
    assert order.top_mask(x, 2).tolist() == [False, True, False, True]


def test_no_tie_search_among_zeros_keeps_all_or_none_of_them():
    x = jnp.array([0.0, 1.0, 0.0])
    assert (
        order.reaches(x, order.top_cutoff(x, 2, zero_ties=False)).tolist() == [True] * 3
    )
    assert order.top_mask(x, 2).tolist() == [True, True, False]


def test_traced_k_vmap_and_clipping():
    x = draw(4, (3, 9), jnp.float32)
    got = jax.jit(jax.vmap(order.top_mask))(x, jnp.array([0, 4, 99]))
    for row, k, mask in zip(x, (0, 4, 9), got, strict=True):
        np.testing.assert_array_equal(mask, oracle(row, k))


def test_k_per_task():
    taus = {"w": draw(5, (2, 8), jnp.float32)}
    cutoffs = order.task_top_cutoffs(taus, jnp.array([2, 5]))
    masks = jax.vmap(order.reaches)(taus["w"], cutoffs["w"])
    assert masks.sum(1).tolist() == [2, 5]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_refuses_dtypes_without_magnitude_bits(dtype):
    with pytest.raises(ValueError, match=f"dtype is {jnp.dtype(dtype)}"):
        order.magnitude_bits(jnp.zeros(3, dtype))


def test_more_entries_than_a_word_counts(monkeypatch):
    """Blocks of at most 20 entries stand in for blocks of 2^32."""
    monkeypatch.setattr(_wide, "SPAN", 20)
    x = {"w": draw(6, (2, 5, 3, 4), jnp.float32), "b": draw(7, (2, 7), jnp.bfloat16)}
    flat = [
        np.concatenate([np.asarray(x[k][t], np.float32).ravel() for k in "bw"])
        for t in range(2)
    ]
    for k in (0, 1, 33, 50, 67):
        cutoffs = order.task_top_cutoffs(x, k)
        assert cutoffs["w"].block is not None
        assert cutoffs["b"].block is None
        masks = jax.tree.map(lambda a, c: jax.vmap(order.reaches)(a, c), x, cutoffs)
        for t in range(2):
            got = np.concatenate([np.asarray(masks[n][t]).ravel() for n in "bw"])
            np.testing.assert_array_equal(got, oracle(flat[t], k))


def test_an_axis_that_no_word_counts_is_refused(monkeypatch):
    monkeypatch.setattr(_wide, "SPAN", 20)
    with pytest.raises(ValueError, match=r"\(1, 21\) has too many entries"):
        order.top_cutoff(jnp.ones(21), 3)


def test_scores_are_computed_once():
    scores = jnp.asarray([[0.0, -1.5], [jnp.inf, 2.0]])
    assert order.settled(scores) is scores
    for x in (scores, jnp.zeros((2, 2)), scores.at[0, 0].set(jnp.nan)):
        np.testing.assert_array_equal(jax.jit(order.settled)(x), x)
    many = jax.jit(jax.vmap(order.settled))(scores)
    np.testing.assert_array_equal(many, scores)
    text = jax.jit(order.settled).lower(scores).as_text()
    assert "case" in text or "stablehlo.if" in text
