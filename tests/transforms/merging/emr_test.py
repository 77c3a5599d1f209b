"""EMR against its equations in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import masking, merging

pytestmark = pytest.mark.fast


def oracle(leaves, balance):
    """Per leaf [T, n] float64: unified vectors, masks, and the rescalers."""
    count = len(leaves[0])
    unified, masks = [], []
    before, after = np.zeros(count), np.zeros(count)
    for x in leaves:
        sign = np.sign(x.sum(0))
        mask = x * sign > 0
        unified.append(sign * np.max(np.abs(x) * mask, 0))
        masks.append(mask)
        size = x.shape[1] if balance == "leaves" else 1
        before += np.abs(x).sum(1) / size
        after += np.abs(mask * unified[-1]).sum(1) / size
    return unified, masks, before / after


def draw(seed, count=3):
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(count, 12)), rng.normal(size=(count, 5))]
    return x, {
        "a": jnp.asarray(x[0].reshape(count, 3, 4), jnp.float32),
        "b": jnp.asarray(x[1], jnp.float32),
    }


@pytest.mark.parametrize("balance", ["entries", "leaves"])
@hypothesis.given(st.integers(0, 2**31 - 1))
def test_matches_the_equations(balance, seed):
    x, taus = draw(seed)
    got = merging.emr(taus, balance=balance)
    unified, masks, rescalers = oracle(x, balance)
    for name, u, m in zip("ab", unified, masks, strict=True):
        np.testing.assert_allclose(np.ravel(got.unified[name]), u, rtol=1e-6)
        np.testing.assert_array_equal(np.reshape(got.masks[name], m.shape), m)
    np.testing.assert_allclose(got.rescalers, rescalers, rtol=1e-5)


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_a_restored_task_keeps_its_norm_and_signs(seed):
    _, taus = draw(seed)
    merged = merging.emr(taus)
    for t in range(3):
        delta = merging.emr_restore(merged, t)
        have = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(delta))
        want = sum(float(jnp.abs(x[t]).sum()) for x in jax.tree.leaves(taus))
        np.testing.assert_allclose(have, want, rtol=1e-5)
        for d, x in zip(jax.tree.leaves(delta), jax.tree.leaves(taus), strict=True):
            assert bool(jnp.all(d * x[t] >= 0))


def test_one_task_and_equal_tasks_come_back():
    _, taus = draw(0, 1)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), taus)
    for given in (taus, twice):
        delta = merging.emr_restore(merging.emr(given), -1)
        for name in "ab":
            np.testing.assert_allclose(delta[name], taus[name][0], rtol=1e-6)


def test_zero_and_opposite_tasks_are_no_nan():
    taus = {"w": jnp.array([[1.0, 2.0, 0.0], [-1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])}
    merged = merging.emr(taus)
    assert merged.unified["w"].tolist() == [0.0, 3.0, 0.0]
    np.testing.assert_allclose(merged.rescalers, [1.0, 4 / 3, 1.0], rtol=1e-6)
    assert merging.emr_restore(merged, 2)["w"].tolist() == [0.0] * 3
    empty = merging.emr({"w": jnp.zeros((2, 3)), "e": jnp.zeros((2, 0))})
    assert empty.rescalers.tolist() == [1.0, 1.0]


def test_order_scale_weights_dtypes_and_jit():
    _, taus = draw(1)
    base = merging.emr(taus)
    back = merging.emr(jax.tree.map(lambda x: 4 * x[::-1], taus))
    np.testing.assert_allclose(back.unified["a"], 4 * base.unified["a"], rtol=1e-6)
    np.testing.assert_allclose(back.rescalers[::-1], base.rescalers, rtol=1e-5)
    skewed = merging.emr({"w": jnp.array([[1.0], [-2.0]])}, weights=[3.0, 1.0])
    assert skewed.unified["w"].tolist() == [1.0]
    mixed = {"w": taus["a"].astype(jnp.bfloat16), "n": jnp.ones((3, 2), jnp.int32)}
    made = jax.jit(merging.emr)(mixed)
    delta = jax.jit(merging.emr_restore)(made, jnp.asarray(1))
    assert delta["w"].dtype == jnp.bfloat16 and delta["n"].tolist() == [1, 1]
    packed = masking.pack(made.masks, per_task=True)
    assert packed["w"].shape == (3, 2)


@pytest.mark.parametrize("task", [3, -4, 1.5, None])
def test_no_such_task(task):
    merged = merging.emr({"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="emr_restore: task is"):
        merging.emr_restore(merged, task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "rows"}, "balance is 'rows', wanted one of"),
        ({"weights": [1.0, -1.0]}, "wanted all of them positive"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"emr: .*{message}"):
        merging.emr({"w": jnp.ones((2, 3))}, **options)
