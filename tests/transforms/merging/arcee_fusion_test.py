"""Arcee Fusion against its definition in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging
from mtl_jax.transforms.merging import _arcee_fusion

pytestmark = pytest.mark.fast


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def importance(tau, base, axis=-1, epsilon=1e-8):
    p, q = softmax(base + tau, axis) + epsilon, softmax(base, axis) + epsilon
    return np.abs(tau) * (p * np.log(p / q)).sum(axis, keepdims=True)


def oracle(tau, base, axis=-1):
    score = importance(tau, base, axis)
    order = np.sort(score.ravel())
    quarter, half, most = (order[int(q * (order.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(score >= half + 1.5 * (most - quarter), tau, 0)


def draw(seed, size, scale=1.0):
    """Numbers that float32 holds, so that base + tau rounds only in the oracle."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, size=size).astype(np.float32) * np.float32(scale)
    return x.astype(np.float64)


@pytest.mark.parametrize("axis", [-1, -2])
@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10)
def test_matches_the_definition(axis, seed):
    tau, base = draw(seed, (9, 8), 0.1), draw(seed + 1, (9, 8))
    got = merging.arcee_fusion(
        {"w": jnp.asarray(tau, jnp.float32)[None]},
        base={"w": jnp.asarray(base, jnp.float32)},
        axis=axis,
    )["w"]
    np.testing.assert_allclose(got, oracle(tau, base, axis), rtol=1e-6)
    assert 0 < np.count_nonzero(got) < got.size


@pytest.mark.parametrize("scale", [3.0, 1e-2, 1e-4])
def test_small_divergences_keep_their_digits(scale):
    tau, base = draw(0, (6, 40), scale), draw(1, (6, 40), 0.02)
    args = (jnp.asarray(tau, jnp.float32), jnp.asarray(base, jnp.float32))
    got = _arcee_fusion._importance(*args, -1, jnp.float32(1e-8))
    # Positive terms in float64 as well: the plain formula has 1e-16 / 1e-8 left there.
    np.testing.assert_allclose(got, importance(tau, base), rtol=1e-4, atol=1e-12)


def test_vectors_are_one_row_and_single_entries_are_kept():
    tau, base = draw(2, (11,)), draw(3, (11,))
    taus = {"v": jnp.asarray(tau, jnp.float32)[None], "s": jnp.full(1, 2.0)}
    base = {"v": jnp.asarray(base, jnp.float32), "s": jnp.zeros(())}
    got = merging.arcee_fusion(taus, base=base)
    want = oracle(tau, np.asarray(base["v"], np.float64))
    np.testing.assert_allclose(got["v"], want, rtol=1e-6)
    assert float(got["s"]) == 2.0


def test_several_tasks_zero_tasks_dtypes_and_jit():
    x = jnp.asarray(draw(4, (2, 5, 6)), jnp.bfloat16)
    taus = {"w": x, "n": jnp.ones((2, 3), jnp.int32), "e": jnp.zeros((2, 0))}
    base = {"w": x[0] * 0 + 1, "n": jnp.ones(3, jnp.int32), "e": jnp.zeros(0)}
    fuse = jax.jit(lambda taus, base: merging.arcee_fusion(taus, base=base))
    got = fuse(taus, base)
    assert got["w"].dtype == jnp.bfloat16 and got["n"].dtype == jnp.int32
    each = [fuse(jax.tree.map(lambda v, t=t: v[t : t + 1], taus), base) for t in (0, 1)]
    total = sum(e["w"].astype(jnp.float32) for e in each)
    np.testing.assert_array_equal(got["w"], total.astype(jnp.bfloat16))
    zero = merging.arcee_fusion(
        {"w": jnp.zeros((1, 4, 3))}, base={"w": jnp.ones((4, 3))}
    )
    assert not zero["w"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": {"w": jnp.ones(3)}}, r"'w' is \(3,\) in other, \(4, 3\) in taus"),
        ({"base": {"w": jnp.full((4, 3), jnp.nan)}}, "base: 'w' holds NaN"),
        ({"spread": -1}, "spread is -1.0"),
        ({"epsilon": "x"}, "epsilon is 'x'"),
        ({"axis": 2}, "axis of 'w' is 2"),
    ],
)
def test_refuses_by_name(options, message):
    options = {"base": {"w": jnp.ones((4, 3))}, **options}
    with pytest.raises(ValueError, match=f"arcee_fusion.*{message}"):
        merging.arcee_fusion({"w": jnp.ones((2, 4, 3))}, **options)
