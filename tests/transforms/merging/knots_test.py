"""KnOTS: any rule in the basis of all tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, shape=(6, 4)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def run(x, **options):
    return np.asarray(merging.knots({"w": jnp.asarray(x, jnp.float32)}, **options)["w"])


def largest(blocks, weights=None, key=None):
    """Of every entry the value of largest magnitude: a rule that no rotation keeps."""
    del weights, key
    return {
        name: jnp.take_along_axis(x, jnp.abs(x).argmax(0, keepdims=True), 0)[0]
        for name, x in blocks.items()
    }


def oracle(x, rank=None):
    """U largest(S V_t^T) in float64, for [T, out, in]."""
    u, s, vt = np.linalg.svd(np.concatenate(list(x), 1), full_matrices=False)
    u, rows = u[:, :rank], (s[:, None] * vt)[:rank]
    blocks = np.stack(np.split(rows, len(x), 1))
    best = np.abs(blocks).argmax(0)[None]
    return u @ np.take_along_axis(blocks, best, 0)[0]


@pytest.mark.parametrize("svd", ["svd", "gram"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (14, 4)])
def test_matches_the_formula(svd, shape):
    x = draw(0, shape=shape)
    got = run(x, rule=largest, layout="out_in", svd=svd)
    np.testing.assert_allclose(got, oracle(x), atol=2e-3)


def test_rows_of_flax_kernels_are_inputs():
    x = draw(1)
    turned = run(x.swapaxes(1, 2), rule=largest, layout="in_out")
    np.testing.assert_allclose(turned.T, oracle(x), atol=2e-3)


def test_a_rank_keeps_the_leading_directions():
    x = draw(2)
    got = run(x, rule=largest, layout="out_in", rank=2)
    np.testing.assert_allclose(got, oracle(x, 2), atol=2e-3)
    low = np.einsum("tmr,trn->tmn", draw(3, 3, (6, 1)), draw(4, 3, (1, 5)))
    whole = run(low, rule=merging.task_arithmetic, rank=3)
    np.testing.assert_allclose(whole, low.sum(0), atol=1e-5)


@pytest.mark.parametrize("svd", ["svd", "gram"])
def test_a_linear_rule_sees_no_basis(svd):
    x = draw(5)
    weights = [1.0, 2.0, -0.5]
    got = run(x, rule=merging.task_arithmetic, weights=weights, svd=svd)
    np.testing.assert_allclose(got, np.tensordot(weights, x, 1), atol=1e-5)


def test_ties_by_default_and_one_task_is_itself():
    x = draw(6, 1)
    full = functools.partial(merging.ties, density=1.0)
    np.testing.assert_allclose(run(x, rule=full), x[0], atol=1e-5)
    five = draw(7)
    np.testing.assert_array_equal(run(five), run(five, rule=merging.ties))


def test_the_trim_of_a_rule_is_of_all_matrices_together():
    x = draw(8, 2)
    taus = {"a": jnp.asarray(x, jnp.float32), "b": jnp.asarray(100 * x, jnp.float32)}
    got = merging.knots(taus, rule=functools.partial(merging.ties, density=0.4))
    assert np.asarray(got["b"]).any() and not np.asarray(got["a"]).any()


def test_keys_reach_the_rule():
    x = draw(9)
    rule = functools.partial(merging.dare, density=0.5)
    one, again, other = (run(x, rule=rule, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_trees_and_jit():
    x = draw(10, shape=(2, 6, 4))
    taus = {
        "bias": jnp.asarray(x[:, 0, 0], jnp.float32),
        "empty": jnp.zeros((3, 0, 2)),
        "layers": jnp.asarray(x, jnp.bfloat16),
        "zero": jnp.zeros((3, 2, 2)),
    }

    def matrices(name, shape):
        return len(shape) > 1 and name != "empty"

    def f(taus):
        return merging.knots(taus, rule=merging.task_arithmetic, matrices=matrices)

    for got in (f(taus), jax.jit(f)(taus)):
        assert got["layers"].dtype == jnp.bfloat16 and got["empty"].shape == (0, 2)
        want = taus["layers"].astype(jnp.float32).sum(0)
        np.testing.assert_allclose(got["layers"].astype(jnp.float32), want, atol=3e-2)
        np.testing.assert_allclose(got["bias"], taus["bias"].mean(0), atol=1e-6)
        assert not np.asarray(got["zero"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "sketch"}, "svd is 'sketch'"),
        ({"layout": "io"}, "layout is 'io'"),
        ({"rank": 0}, "rank is 0, wanted at least 1"),
        ({"weights": [1.0]}, r"weights are \(1,\)"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"knots: {message}"):
        run(draw(0), **options)
