import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import tree
from mtl_jax.transforms.quantization import nf4

pytestmark = pytest.mark.fast


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_levels_are_the_published_quantiles():
    """Eight steps of probability above zero, seven below, up to 0.9677083."""
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    want = np.sort([*above, 0.0, *below]) / above[0]
    np.testing.assert_allclose(nf4.LEVELS, want, atol=1e-6)
    assert nf4.LEVELS[7] == 0 and nf4.LEVELS[0] == -1 and nf4.LEVELS[15] == 1


def by_hand(x, block):
    """The nearest level of every value, by distance."""
    out = np.zeros_like(x, np.float64)
    for row in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], block):
            place = (*row, slice(start, start + block))
            scale = np.abs(x[place]).max()
            if scale:
                levels = nf4.LEVELS.astype(np.float64)
                gap = np.abs(x[place][:, None] / scale - levels[None])
                out[place] = levels[gap.argmin(1)] * scale
    return out


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([2, 4]), st.booleans())
def test_every_value_goes_to_the_nearest_level(rows, width, block, double):
    """Kills truncation, swapped halves of a byte and scales of another block."""
    x = normal(rows, width, seed=rows + 10 * width)
    leaf = nf4.encode(jnp.asarray(x), block=block, double=double)
    assert leaf.shape == x.shape and leaf.codes.dtype == jnp.uint8
    got = np.asarray(nf4.decode(leaf))
    if not double:
        np.testing.assert_allclose(got, by_hand(x, block), rtol=1e-6, atol=1e-7)


def test_error_is_bounded_by_half_the_widest_gap():
    x = normal(8, 256)
    got = np.asarray(nf4.decode(nf4.encode(jnp.asarray(x))))
    scales = np.abs(x.reshape(8, 4, 64)).max(-1, keepdims=True)
    gap = np.abs((got - x).reshape(8, 4, 64)) / scales
    assert gap.max() <= np.diff(nf4.LEVELS).max() / 2 + 1e-6
    assert np.sqrt(np.mean((got - x) ** 2)) < 0.1


def test_bytes():
    """4 bits a value and 32 a block; with double quantisation 8 a block and a few."""
    leaf = jnp.asarray(normal(4, 64 * 256))
    bits = [8 * tree.nbytes(nf4.encode(leaf, double=d)) / leaf.size for d in (0, 1)]
    assert bits[0] == 4.5
    assert bits[1] == 4 + 8 / 64 + (32 + 32) / (64 * 256)


def test_double_quantisation_costs_little():
    x = normal(3, 64 * 300)
    once, twice = (
        np.asarray(nf4.decode(nf4.encode(jnp.asarray(x), double=d))) for d in (0, 1)
    )
    error = [np.mean((x - y) ** 2) for y in (once, twice)]
    assert not np.array_equal(once, twice)
    assert error[1] < 1.02 * error[0]


def test_dtypes_zeros_and_scanned_leaves():
    x = jnp.zeros((2, 3, 10), jnp.bfloat16).at[1].set(1.5)
    leaf = nf4.encode(x)
    found = nf4.decode(leaf)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, x)
    part = jax.tree.map(lambda y: y[1], leaf)  # What a scan hands to a layer.
    assert part.shape == (3, 10)
    np.testing.assert_array_equal(nf4.decode(part), x[1])
    assert nf4.decode(leaf, jnp.float32).dtype == jnp.float32


def test_trees():
    params = {"a": {"kernel": jnp.asarray(normal(4, 8))}, "b": jnp.ones(3)}
    small = nf4.quantize(params, "kernel$", block=4)
    assert nf4.is_quantized(small["a"]["kernel"]) and small["b"] is params["b"]
    again = nf4.dequantize(small)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    twice = nf4.dequantize(nf4.quantize(again, "kernel$", block=4))
    jax.tree.map(np.testing.assert_array_equal, twice, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nf4.encode(jnp.arange(4)), "wanted a floating array, found int32"),
        (lambda: nf4.encode(jnp.ones(4), block=3), "block must be even"),
        (lambda: nf4.quantize({"w": jnp.ones(4)}, "v"), "'v' matches no leaf"),
        (lambda: nf4.quantize({"w": jnp.arange(4)}, "w"), "'w': nf4.encode"),
        (lambda: nf4.quantize({"w": jnp.full(4, jnp.nan)}, "w"), "nf4.quantize.*'w'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
