"""Wanda and SparseGPT against loops in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def problem(seed, inputs=12, outputs=5, tasks=2, rows=40, layers=()):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tasks, *layers, rows, inputs))
    x = x * rng.uniform(0.1, 3, inputs) + x[..., :1]
    gram = np.einsum("...ri,...rj->...ij", x, x) / rows
    w = rng.normal(size=(tasks, *layers, inputs, outputs))
    return x, gram, w


def single(x):
    return jnp.asarray(x, jnp.float32)


def top(score, count):
    """Marks the largest of a vector, the first of equals."""
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score.ravel(), kind="stable")[:count]] = True
    return mask.reshape(score.shape)


def sparse_gpt(w, gram, density, pattern, block, damping=0.01):
    """The released algorithm on w [out, in], by an explicit inverse."""
    w, gram = w.copy(), gram.copy()
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1
    w[:, dead] = 0
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        scale = np.diag(upper)[first:last]
        keep = np.ones((len(w), last - first), bool)
        if pattern is None:
            score = (w[:, first:last] / scale) ** 2
            keep = top(score, int(np.floor(density * score.size)))
        for i in range(first, last):
            if pattern is not None and (i - first) % pattern[1] == 0:
                at = slice(i, i + pattern[1])
                score = (w[:, at] / np.diag(upper)[at]) ** 2
                own = np.stack([top(row, pattern[0]) for row in score])
                keep[:, i - first : i - first + pattern[1]] = own
            error = np.where(keep[:, i - first], 0, w[:, i] / upper[i, i])
            w[:, i:] -= np.outer(error, upper[i, i:])
            w[~keep[:, i - first], i] = 0
    return w


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans()
)
def test_wanda_keeps_the_largest_products_of_each_output(seed, density, turned):
    x, gram, w = problem(seed)
    score = np.abs(w) * np.linalg.norm(x, axis=1)[..., None]
    want = np.zeros(w.shape, bool)
    for t in range(2):
        for j in range(w.shape[-1]):
            want[t, :, j] = top(score[t, :, j], int(density * w.shape[1]))
    taus = {"w": single(w.swapaxes(1, 2) if turned else w), "b": jnp.ones((2, 5))}
    layout = "out_in" if turned else "in_out"
    found = merging.wanda_masks(
        taus, {"w": single(gram)}, density=density, layout=layout
    )
    got = np.asarray(found["w"])
    np.testing.assert_array_equal(got.swapaxes(1, 2) if turned else got, want)
    assert found["b"].all()


def test_wanda_pattern_layers_and_jit():
    _, gram, w = problem(1, layers=(3,))
    taus, grams = {"w": single(w)}, {"w": single(gram)}
    mark = jax.jit(lambda t, g: merging.wanda_masks(t, g, pattern=(1, 4)))
    got = np.asarray(mark(taus, grams)["w"])
    assert got.shape == w.shape
    score = np.abs(w) * np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    groups = score.reshape(2, 3, 3, 4, 5)
    want = groups == groups.max(3, keepdims=True)
    np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 3)])
@pytest.mark.parametrize("block", [4, 5, 12, 128])
def test_sparse_gpt_equals_the_released_algorithm(pattern, block):
    _, gram, w = problem(2, layers=(2,))
    gram[0, 1, 3] = gram[0, 1, :, 3] = 0
    wide = block if pattern is None else -(-block // pattern[1]) * pattern[1]
    want = np.stack(
        [
            [sparse_gpt(w[t, b].T, gram[t, b], 0.5, pattern, wide).T for b in range(2)]
            for t in range(2)
        ]
    )
    taus, grams = {"w": single(w), "b": jnp.ones((2, 5))}, {"w": single(gram)}
    prune = jax.jit(lambda t, g: merging.sparse_gpt(t, g, pattern=pattern, block=block))
    got = prune(taus, grams)
    np.testing.assert_allclose(got["w"], want, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(got["w"]) == 0, want == 0)
    np.testing.assert_array_equal(got["b"], taus["b"])
    turned = merging.sparse_gpt(
        {"w": jnp.swapaxes(taus["w"], -1, -2)},
        grams,
        pattern=pattern,
        block=block,
        layout="out_in",
    )
    np.testing.assert_allclose(jnp.swapaxes(turned["w"], -1, -2), want, atol=2e-5)


def test_outputs_change_less_than_by_masks_alone():
    x, gram, w = problem(3, inputs=64, outputs=32, rows=256)
    mixing = np.eye(64) + np.random.default_rng(4).normal(size=(64, 64)) / 20
    x = x @ mixing
    gram = np.einsum("tri,trj->tij", x, x) / 256
    taus, grams = {"w": single(w)}, {"w": single(gram)}

    def loss(pruned):
        return np.linalg.norm(x @ (np.asarray(pruned, np.float64) - w))

    magnitude = merging.magnitude_masks(taus, density=0.5, scope="leaf")["w"]
    wanda = merging.wanda_masks(taus, grams)["w"]
    second = merging.sparse_gpt(taus, grams, block=16)["w"]
    assert float((second != 0).mean()) == 0.5
    losses = [
        loss(jnp.where(magnitude, taus["w"], 0)),
        loss(jnp.where(wanda, taus["w"], 0)),
        loss(second),
    ]
    assert losses[2] < 0.8 * losses[1] < 0.8 * losses[0], losses


def test_dtypes_and_whole_densities():
    _, gram, w = problem(5)
    taus, grams = {"w": jnp.asarray(w, jnp.bfloat16)}, {"w": single(gram)}
    got = merging.sparse_gpt(taus, grams)["w"]
    assert got.dtype == jnp.bfloat16
    assert int((got != 0).sum()) == w.size // 2
    same = merging.sparse_gpt(taus, grams, density=1.0)["w"]
    np.testing.assert_array_equal(same, taus["w"])
    assert not merging.sparse_gpt(taus, grams, density=0.0)["w"].any()


def test_errors():
    _, gram, w = problem(6)
    taus, grams = {"w": single(w)}, {"w": single(gram)}
    for fn in (merging.wanda_masks, merging.sparse_gpt):
        name = fn.__name__
        with pytest.raises(ValueError, match=f"{name}: 'w' has 12 inputs, no multiple"):
            fn(taus, grams, pattern=(2, 5))
        with pytest.raises(ValueError, match=f"{name}: pattern is .* n <= m"):
            fn(taus, grams, pattern=(3, 2))
        with pytest.raises(ValueError, match=f"{name}: density"):
            fn(taus, grams, density=1.5)
        with pytest.raises(ValueError, match=f"{name}: there is no Gram in grams"):
            fn(taus, {})
        with pytest.raises(ValueError, match=f"{name}: the Gram of 'w' is"):
            fn(taus, {"w": jnp.ones((2, 3, 3))})
        with pytest.raises(ValueError, match=f"{name}: grams"):
            fn(taus, {"w": jnp.full((2, 12, 12), jnp.nan)})
    with pytest.raises(ValueError, match="sparse_gpt: block is 0 and damping 0.01"):
        merging.sparse_gpt(taus, grams, block=0)
