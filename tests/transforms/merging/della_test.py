"""DELLA: its probabilities, its mean, and rows of one entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging
from mtl_jax.transforms.merging import _della

pytestmark = pytest.mark.fast
KEY = jax.random.key(0)
LINEAR = {"elect": "none", "reduce": "sum"}


def probabilities(x, density, spread, axis=-1):
    """Linear in the rank of |x| along an axis."""
    length = x.shape[axis]
    rank = np.argsort(np.argsort(np.abs(x), axis, kind="stable"), axis, kind="stable")
    if length == 1:
        return np.full(x.shape, density)
    return density - spread + 2 * spread * rank / (length - 1)


def sample(x, draws=2000, **options):
    """[draws, ...] merges of one task under different keys."""
    taus = {"w": jnp.asarray(x, jnp.float32)[None]}
    keys = jax.random.split(KEY, draws)
    merge = jax.jit(
        jax.vmap(lambda key: merging.della(taus, key=key, **LINEAR, **options)["w"])
    )
    return np.asarray(merge(keys))


@pytest.mark.parametrize("axis", [-1, -2])
def test_kept_by_rank_and_unbiased(axis):
    x = np.random.default_rng(0).normal(size=(3, 5))
    drawn = sample(x, density=0.5, spread=0.4, axis=axis)
    p = probabilities(x, 0.5, 0.4, axis)
    error = np.sqrt(p * (1 - p) / len(drawn))
    assert (np.abs((drawn != 0).mean(0) - p) <= 5 * error).all()
    at = drawn != 0
    np.testing.assert_allclose(drawn[at], np.broadcast_to(x / p, drawn.shape)[at], 1e-5)
    spread = np.abs(x / p) * error
    assert (np.abs(drawn.mean(0) - x) <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ranks_are_those_of_a_stable_sort(dtype):
    rng = np.random.default_rng(3)
    few = rng.integers(-4, 5, (4, 70)) * 0.5
    many = rng.normal(size=(4, 70)) * 10.0 ** rng.integers(-38, 38, (4, 70))
    for x in (few, many):
        x = jnp.asarray(x, dtype)
        order = np.argsort(np.abs(np.asarray(x, np.float64)), -1, kind="stable")
        want = np.argsort(order, -1, kind="stable")
        np.testing.assert_array_equal(_della._ranks(x), want)


@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
def test_rows_of_one_entry_are_kept_as_often_as_the_density_says(shape):
    drawn = sample(np.full(shape, 2.0), density=0.6, spread=0.3)
    kept = (drawn != 0).mean(0)
    assert (np.abs(kept - 0.6) <= 5 * np.sqrt(0.24 / len(drawn))).all()
    assert np.isfinite(drawn).all()
    np.testing.assert_allclose(drawn[drawn != 0], 2.0 / 0.6, rtol=1e-5)


def test_the_sum_of_magnitudes_is_restored():
    x = np.random.default_rng(1).normal(size=(4, 6))
    drawn = sample(x, draws=20, density=0.5, rescale="l1")
    totals = np.abs(drawn).sum((1, 2))
    np.testing.assert_allclose(totals, np.abs(x).sum(), rtol=1e-5)
    plain = sample(x, draws=20, density=0.5, rescale="none")
    np.testing.assert_array_equal(plain != 0, drawn != 0)
    x = np.broadcast_to(x.astype(np.float32), plain.shape)
    np.testing.assert_array_equal(plain[plain != 0], x[plain != 0])


def test_full_density_is_ties_without_trimming():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)), jnp.float32)
    got = merging.della({"w": x}, density=1.0, spread=0.0, key=KEY)["w"]
    want = merging.ties({"w": x}, density=1.0, zero_sign="none")["w"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    linear = merging.della({"w": x}, density=1.0, spread=0.0, key=KEY, **LINEAR)["w"]
    np.testing.assert_allclose(linear, x.sum(0), rtol=1e-5, atol=1e-6)


def test_zero_empty_dtypes_keys_and_jit():
    taus = {
        "w": jnp.ones((2, 3, 4), jnp.bfloat16),
        "z": jnp.zeros((2, 3)),
        "e": jnp.zeros((2, 0)),
        "n": jnp.ones((2, 2), jnp.int32),
    }
    for rescale in ("probability", "l1", "none"):
        merge = jax.jit(
            lambda taus, key, r=rescale: merging.della(
                taus, density=0.5, key=key, rescale=r
            )
        )
        got = merge(taus, KEY)
        assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(
            lambda v: (v.shape[1:], v.dtype), taus
        )
        assert not got["z"].any()
    once = merging.della(taus, density=0.5, key=KEY)["w"]
    again = merging.della(taus, density=0.5, key=KEY)["w"]
    other = merging.della(taus, density=0.5, key=jax.random.key(1))["w"]
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, "density is 0.1 and spread 0.15"),
        ({"density": 0.95}, "density is 0.95 and spread 0.15"),
        ({"density": "x"}, "density is 'x', wanted a number"),
        ({"spread": -0.1}, "spread is -0.1"),
        ({"rescale": True}, "rescale is True, wanted one of"),
        ({"elect": "max"}, "elect is 'max'"),
        ({"reduce": "max"}, "reduce is 'max'"),
        ({"key": 0}, "key is 0, wanted one made by jax.random.key"),
        ({"weights": [1.0, -1.0]}, "wanted all of them positive"),
        ({"weights": [1.0, -1.0], "elect": "none"}, "wanted a sum other than 0"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"della: .*{message}"):
        merging.della(
            {"w": jnp.ones((2, 3))}, **{"density": 0.5, "key": KEY, **options}
        )
