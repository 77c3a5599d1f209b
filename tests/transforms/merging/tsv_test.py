"""TSV-M against its formulas in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def polar(x, tolerance=1e-6):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    real = s > tolerance * s[:1]
    return u[:, real] @ vt[real]


def oracle(taus):
    """Algorithm 1 on float64 [T, m, n]."""
    rank = min(taus.shape[1:]) // len(taus)
    left, middle, right = [], [], []
    for tau in taus:
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        real = s[:rank] > 1e-6 * max(s[0], 1e-30)
        left.append(u[:, :rank] * real)
        middle.append(s[:rank] * real)
        right.append(vt[:rank] * real[:, None])
    left, right = np.concatenate(left, 1), np.concatenate(right, 0)
    return polar(left) @ np.diag(np.concatenate(middle)) @ polar(right)


def draw(seed, T=3, shape=(7, 9)):
    return np.random.default_rng(seed).normal(size=(T, *shape))


def merged(x, **options):
    return np.asarray(
        merging.tsv_merge({"w": jnp.asarray(x, jnp.float32)}, **options)["w"]
    )


def close(got, want, tolerance):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("svd", "polar", "tolerance"),
    [("svd", "svd", 1e-4), ("gram", "gram", 1e-3), ("gram", "newton", 3e-3)],
)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_matches_algorithm_1(svd, polar, tolerance, shape):
    for seed in range(3):
        x = draw(seed, shape=shape)
        close(merged(x, svd=svd, polar=polar), oracle(x), tolerance)


def test_a_sketch_finds_the_leading_directions():
    rng = np.random.default_rng(0)
    x = draw(0, 10, (150, 140))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    x = u * np.geomspace(1, 1e-4, 140) @ vt * rng.uniform(1, 2, (10, 1, 1))
    close(merged(x, svd="sketch"), oracle(x), 1e-2)


def test_one_task_is_itself():
    x = draw(1, 1)
    close(merged(x), x[0], 1e-5)


def test_orthogonal_tasks_are_summed():
    x = np.zeros((2, 4, 4))
    x[0, :2, :2], x[1, 2:, 2:] = draw(2, 1, (2, 2))[0], draw(3, 1, (2, 2))[0]
    close(merged(x), x.sum(0), 1e-5)


def test_equal_experts_give_their_leading_part():
    tau = draw(4, 1)[0]
    u, s, vt = np.linalg.svd(tau, full_matrices=False)
    want = u[:, :2] * s[:2] @ vt[:2]
    close(merged(np.stack([tau] * 3)), want, 1e-4)


@pytest.mark.parametrize("polar", ["svd", "gram", "newton"])
def test_a_zero_task_takes_nothing_from_the_others(polar):
    x = draw(5)
    x[1] = 0
    close(merged(x, polar=polar), oracle(x), 1e-3)
    assert np.array_equal(merged(0 * x, polar=polar), np.zeros((7, 9)))


def test_opposite_tasks_do_not_cancel_into_nan():
    tau = draw(6, 1)[0]
    assert np.isfinite(merged(np.stack([tau, -tau]))).all()


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.integers(0, 2**31 - 1), st.permutations(range(3)))
def test_order_and_scale(seed, order):
    x = draw(seed)
    base = merged(x)
    close(merged(x[list(order)]), base, 1e-3)
    close(merged(8 * x), 8 * base, 1e-4)
    close(merged(x, weights=[8.0, 8.0, 8.0]), 8 * base, 1e-4)


def test_other_leaves_are_averaged_and_dtypes_kept():
    x = draw(7)
    taus = {
        "bias": jnp.asarray(x[:, 0], jnp.bfloat16),
        "conv": jnp.asarray(draw(8, shape=(2, 2, 3, 5)), jnp.float32),
        "empty": jnp.zeros((3, 0, 4)),
        "one": jnp.asarray([[[1.0]], [[2.0]], [[6.0]]]),
        "step": jnp.zeros((3, 2), jnp.int32),
        "w": jnp.asarray(x, jnp.bfloat16),
    }
    got = merging.tsv_merge(taus, weights=[1.0, 1.0, 2.0])
    assert got["one"].tolist() == [[3.75]]
    assert got["empty"].shape == (0, 4) and got["step"].dtype == jnp.int32
    mean = np.average(np.asarray(taus["conv"]), axis=0, weights=[1, 1, 2])
    np.testing.assert_allclose(got["conv"], mean, rtol=1e-5, atol=1e-6)
    assert got["bias"].dtype == got["w"].dtype == jnp.bfloat16
    wide = np.asarray(taus["w"].astype(jnp.float32), np.float64)
    close(np.asarray(got["w"], np.float64), oracle(wide * [[[1]], [[1]], [[2]]]), 2e-2)


def test_a_rule_says_which_leaves_are_matrices():
    layers = draw(9, shape=(2, 7, 9))
    kernel = draw(10, shape=(2, 2, 3, 5))
    taus = {
        "conv": jnp.asarray(kernel, jnp.float32),
        "embedding": jnp.asarray(draw(11), jnp.float32),
        "layers": jnp.asarray(layers, jnp.float32),
    }

    def matrices(name, shape):
        return {"layers": True, "conv": (0, len(shape) - 1)}.get(name)

    got = merging.tsv_merge(taus, matrices=matrices)
    for i in range(2):
        close(np.asarray(got["layers"][i]), oracle(layers[:, i]), 1e-4)
    close(
        np.asarray(got["conv"]).reshape(12, 5), oracle(kernel.reshape(3, 12, 5)), 1e-4
    )
    np.testing.assert_allclose(got["embedding"], taus["embedding"].mean(0), rtol=1e-5)


def test_jit_and_vmap_agree_with_eager():
    x = jnp.asarray(draw(12, 6).reshape(2, 3, 7, 9), jnp.float32)
    both = jax.jit(jax.vmap(lambda w: merging.tsv_merge({"w": w})["w"]))(x)
    for i in range(2):
        close(np.asarray(both[i]), merged(x[i]), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "qr"}, "svd is 'qr', wanted one of"),
        ({"polar": "qr"}, "polar is 'qr', wanted one of"),
        ({"weights": [1.0, -1.0, 0.0]}, "a sum other than 0"),
        ({"matrices": lambda *_: (1, 1)}, r"gives \(1, 1\) for 'w' of \(7, 9\)"),
        ({"matrices": lambda *_: 3}, "gives 3 for 'w'"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"tsv_merge: .*{message}"):
        merged(draw(0), **options)


def test_nan_and_complex_are_refused_by_leaf():
    with pytest.raises(ValueError, match="tsv_merge: 'w' holds NaN"):
        merged(np.full((2, 3, 3), np.nan))
    with pytest.raises(ValueError, match="tsv_merge: 'w' is complex64"):
        merging.tsv_merge({"w": jnp.ones((2, 3, 3), jnp.complex64)})
