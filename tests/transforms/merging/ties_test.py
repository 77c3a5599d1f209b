"""TIES against the flat definition in float64 loops."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree


def oracle(flat, density, weights, reduce="disjoint_mean"):
    """Algorithm 1 on full vectors [T, P], with stable ties and the majority sign."""
    T, P = flat.shape
    kept = np.zeros_like(flat)
    for t in range(T):
        top = np.argsort(-np.abs(flat[t]), kind="stable")[: int(density * P + 1e-9)]
        kept[t, top] = weights[t] * flat[t, top]
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    out = np.zeros(P)
    for p in range(P):
        agree = [t for t in range(T) if kept[t, p] * sign[p] > 0]
        if agree:
            out[p] = sum(kept[t, p] for t in agree)
            if reduce == "disjoint_mean":
                out[p] /= sum(weights[t] for t in agree)
    return out


def draw(seed, T):
    """Multiples of one half: sums are exact, ties and cancelled signs are common."""
    rng = np.random.default_rng(seed)
    flat = rng.integers(-4, 5, (T, 20)) * 0.5
    taus = {
        "a": jnp.asarray(flat[:, :12].reshape(T, 3, 4), jnp.float32),
        "b": jnp.asarray(flat[:, 12:19], jnp.float32),
        "c": jnp.asarray(flat[:, 19], jnp.float32),
        "d": jnp.zeros((T, 0)),
        "n": jnp.zeros((T, 2), jnp.int32),
    }
    return flat, taus


def ravel(delta):
    return np.concatenate([np.asarray(delta[k]).ravel() for k in "abc"])


@pytest.mark.parametrize("reduce", ["disjoint_mean", "sum"])
@hypothesis.given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 0.2, 0.55, 1.0]),
    st.booleans(),
)
def test_matches_algorithm_1(reduce, seed, T, density, weighted):
    flat, taus = draw(seed, T)
    weights = np.arange(1, T + 1) * 0.5 if weighted else np.ones(T)
    delta = merging.ties(taus, density=density, weights=weights, reduce=reduce)
    want = oracle(flat, density, weights, reduce)
    np.testing.assert_allclose(ravel(delta), want, rtol=1e-6)
    assert delta["n"].dtype == jnp.int32 and delta["d"].shape == (0,)


def test_leaf_scope_is_global_scope_of_each_leaf():
    _, taus = draw(0, 3)
    delta = merging.ties(taus, density=0.5, scope="leaf", zero_sign="none")
    for name in "abc":
        alone = merging.ties({name: taus[name]}, density=0.5, zero_sign="none")
        np.testing.assert_array_equal(delta[name], alone[name])


def test_one_task_at_full_density_is_that_task():
    flat, taus = draw(1, 1)
    np.testing.assert_array_equal(ravel(merging.ties(taus, density=1.0)), flat[0])


def test_opposite_deltas_cancel_or_follow_the_majority():
    taus = {"w": jnp.array([[1.0, 2.0, 5.0], [-1.0, -2.0, 5.0]])}
    both = merging.ties(taus, density=1.0)["w"]
    assert both.tolist() == [1.0, 2.0, 5.0]
    none = merging.ties(taus, density=1.0, zero_sign="none")["w"]
    assert none.tolist() == [0.0, 0.0, 5.0]


def test_all_zero_deltas_give_zero_not_nan():
    delta = merging.ties({"w": jnp.zeros((3, 4))}, density=0.5)["w"]
    assert delta.tolist() == [0.0] * 4


def test_counting_votes_differs_from_weighing_them():
    taus = {"w": jnp.array([[5.0], [-1.0], [-2.0]])}
    assert merging.ties(taus, density=1.0)["w"].tolist() == [5.0]
    assert merging.ties(taus, density=1.0, elect="count")["w"].tolist() == [-1.5]
    mean = merging.ties(taus, density=1.0, reduce="mean")["w"]
    np.testing.assert_allclose(mean, [5 / 3], rtol=1e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "average", "consensus"])
def test_permutation_and_positive_scale(method):
    flat, taus = draw(2, 3)
    del flat
    options = {"ties": {"density": 0.4}, "consensus": {"scale": 0.4}}.get(method, {})
    merge = getattr(merging, method)
    base = merge(taus, **options)
    order = jnp.array([2, 0, 1])
    shuffled = merge(jax.tree.map(lambda x: x[order], taus), **options)
    scaled = merge(jax.tree.map(lambda x: x * jnp.asarray(4, x.dtype), taus), **options)
    np.testing.assert_allclose(ravel(shuffled), ravel(base), rtol=1e-6)
    np.testing.assert_array_equal(ravel(scaled), 4 * ravel(base))


def test_bfloat16_keeps_dtype_and_accumulates_in_float32():
    taus = {"w": jnp.array([[256.0], [1.0], [1.0], [1.0], [1.0]], jnp.bfloat16)}
    delta = merging.ties(taus, density=1.0, reduce="sum")["w"]
    assert delta.dtype == jnp.bfloat16 and delta[0] == 260


def test_jit_vmap_and_eager_agree():
    _, taus = draw(3, 3)

    def f(taus):
        return merging.ties(taus, density=0.3)

    eager = ravel(f(taus))
    np.testing.assert_array_equal(ravel(jax.jit(f)(taus)), eager)
    pair = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), taus)
    batched = jax.jit(jax.vmap(f))(pair)
    np.testing.assert_array_equal(ravel(jax.tree.map(lambda x: x[0], batched)), eager)


def test_select_is_what_ties_sums():
    _, taus = draw(4, 3)
    chosen = merging.ties_select(taus, density=0.4)
    total = merging.ties(taus, density=0.4, reduce="sum")
    np.testing.assert_array_equal(
        ravel(tree.combine(chosen, jnp.ones(3))), ravel(total)
    )
    trimmed = merging.ties_select(taus, density=0.4, elect="none")
    for t in range(3):
        task = ravel(jax.tree.map(lambda x, t=t: x[t], trimmed))
        assert np.count_nonzero(task) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density is 1.5, wanted 0 <= density <= 1"),
        ({"scope": "row"}, "scope is 'row'"),
        ({"elect": "max"}, "elect is 'max', wanted one of"),
        ({"reduce": "max"}, "reduce is 'max'"),
        ({"zero_sign": "plus"}, "zero_sign is 'plus'"),
        ({"weights": jnp.ones(2)}, r"weights are \(2,\), wanted \(3,\)"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"ties: {message}"):
        merging.ties({"w": jnp.ones((3, 4))}, **options)


def test_a_decimal_density_counts_as_written():
    taus = {"w": jnp.arange(1.0, 101.0)[None]}
    kept = merging.ties(taus, density=0.29)["w"]
    assert int(jnp.sum(kept != 0)) == 29
