import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels, tree
from mtl_jax.kernels.weighted_combine import ref, shapes

TPU = {"implementation": "pallas_tpu", "interpret": True}
WAYS = pytest.mark.parametrize("options", [{}, TPU], ids=["xla", "tpu"])
STACKS = [pytest.param(*case, id=str(case)) for case in shapes.STACKS]


def draw(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def oracle(x, weights):
    return np.tensordot(np.asarray(weights, np.float64), np.asarray(x, np.float64), 1)


def close(got, want, dtype):
    """Against the largest sum; narrow results are rounded once."""
    assert got.dtype == dtype and got.shape == want.shape
    unit = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8, jnp.float16: 2**-11}[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=unit, atol=2e-6 * np.abs(want).max()
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "sums"), STACKS)
def test_kernel_matches_float64(shape, sums, dtype):
    x, weights = draw(shape, dtype), draw((sums, shape[0]), seed=1)
    close(kernels.weighted_combine(x, weights, **TPU), oracle(x, weights), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "sums"), STACKS)
def test_default_and_definition_match_float64(shape, sums, dtype):
    x, weights = draw(shape, dtype), draw((sums, shape[0]), seed=1)
    close(kernels.weighted_combine(x, weights), oracle(x, weights), dtype)
    close(ref.weighted_combine(x, weights), oracle(x, weights), dtype)


@pytest.mark.parametrize(
    ("shape", "sums"),
    [((2, 40, 1100), 1), ((2, 190, 1030), 2), ((17, 70, 1030), 2), ((128, 8300), 1)],
)
def test_kernel_writes_every_block(shape, sums):
    x, weights = draw(shape), draw((sums, shape[0]), seed=1)
    got = kernels.weighted_combine(x, weights, **TPU)
    close(got, oracle(x, weights), jnp.float32)


@WAYS
def test_one_row_of_weights_has_no_leading_axis(options):
    x, weights = draw((3, 2, 130)), draw(3, seed=1)
    got = kernels.weighted_combine(x, weights, **options)
    close(got, oracle(x, weights), jnp.float32)
    same = kernels.weighted_combine(x, weights[None], **options)
    np.testing.assert_array_equal(same[0], got)


@WAYS
@pytest.mark.parametrize("lead", [(), (2,)])
def test_tree_combines_every_leaf(lead, options, monkeypatch):
    from mtl_jax.kernels import tpu_tasks

    monkeypatch.setattr(tpu_tasks, "_ALONE", 600)
    monkeypatch.setattr(tpu_tasks, "_PACK", 300)
    leaves = {
        "bias": draw((3, 130), seed=1),
        "empty": jnp.zeros((3, 0, 4)),
        "kernel": draw((3, 5, 140), seed=2),
        "narrow": draw((3, 40), jnp.bfloat16, seed=3),
        "scale": draw((3,), seed=4),
        "second": draw((3, 2, 128), seed=5),
    }
    weights = draw((*lead, 3), seed=6)
    got = kernels.combine_tree(leaves, weights, **options)
    assert list(got) == list(leaves)
    for name, x in leaves.items():
        assert got[name].shape == (*lead, *x.shape[1:])
        if x.size:
            dtype = jnp.bfloat16 if name == "narrow" else jnp.float32
            close(got[name], oracle(x, weights), dtype)
    if not lead:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), 1e-2, 1e-5
            ),
            got,
            tree.combine(leaves, weights),
        )


@pytest.mark.fast
@WAYS
def test_no_entries_give_no_entries(options):
    x = jnp.zeros((3, 0, 4), jnp.bfloat16)
    got = kernels.weighted_combine(x, jnp.ones((2, 3)), **options)
    assert got.shape == (2, 0, 4) and got.dtype == jnp.bfloat16


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (3, 2, 130)])
def test_nan_spoils_its_entry_and_no_other(shape, options):
    where = (0,) * (len(shape) - 1)
    x = draw(shape).at[(1, *where)].set(jnp.nan)
    got = kernels.weighted_combine(x, jnp.array([1.0, 0.0, 2.0]), **options)
    bad = np.isnan(np.asarray(got))
    assert bad[where] and bad.sum() == 1


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 130)])
def test_derivatives_are_those_of_the_definition(shape, options):
    x, weights = draw(shape), draw((2, shape[0]), seed=1)
    direction = draw((2, *shape[1:]), seed=2)

    def loss(way):
        return lambda x, weights: (direction * way(x, weights) ** 2).sum()

    fast = loss(lambda x, w: kernels.weighted_combine(x, w, **options))
    plain = loss(ref.weighted_combine)
    for derive in (jax.grad, jax.jacfwd):
        for got, want in zip(
            derive(fast, (0, 1))(x, weights),
            derive(plain, (0, 1))(x, weights),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@WAYS
def test_transpose_keeps_dtypes(options):
    x, weights = draw((3, 2, 130), jnp.bfloat16), draw(3, seed=1)

    def total(x, weights):
        out = kernels.weighted_combine(x, weights, **options)
        return out.astype(jnp.float32).sum()

    got, by_weights = jax.grad(total, (0, 1))(x, weights)
    assert got.dtype == jnp.bfloat16 and by_weights.dtype == jnp.float32
    want = np.broadcast_to(np.asarray(weights)[:, None, None], x.shape)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=1e-2)
    np.testing.assert_allclose(
        by_weights, np.asarray(x, np.float64).sum((1, 2)), rtol=1e-3, atol=1e-3
    )


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 130)])
@pytest.mark.parametrize("axes", [(1, 0), (1, None), (None, 0)], ids=str)
def test_vmap_is_one_sum_each(shape, axes, options):
    x = jnp.stack([draw(shape, seed=s) for s in range(3)], axis=1)
    weights = draw((3, shape[0]), seed=7)
    x = x[:, 0] if axes[0] is None else x
    weights = weights[0] if axes[1] is None else weights
    got = jax.vmap(lambda x, w: kernels.weighted_combine(x, w, **options), axes)(
        x, weights
    )
    for s in range(3):
        one = x if axes[0] is None else x[:, s]
        row = weights if axes[1] is None else weights[s]
        close(got[s], oracle(one, row), jnp.float32)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 4), jnp.int32)}, "x is int32, wanted a float"),
        ({"x": jnp.zeros(())}, r"x is \(\), wanted \[T, ...\]"),
        ({"x": jnp.zeros((0, 4))}, r"x is \(0, 4\), wanted \[T, ...\]"),
        ({"weights": jnp.ones(3)}, r"weights are \(3,\), wanted \(2,\) or \(M, 2\)"),
        ({"weights": jnp.ones((0, 2))}, r"weights are \(0, 2\)"),
        ({"weights": jnp.ones((1, 1, 2))}, r"weights are \(1, 1, 2\)"),
        ({"weights": jnp.ones(2, jnp.int32)}, "weights is int32"),
        ({"implementation": "cuda"}, "'cuda' does not exist"),
        ({"implementation": "pallas_tpu"}, "needs a TPU, found an array on cpu"),
        ({"x": jnp.zeros((2, 4), jnp.float16), **TPU}, "found float16"),
        ({"weights": jnp.ones((17, 2)), **TPU}, "at most 16 rows of weights, found 17"),
        (
            {"x": jnp.zeros((129, 4)), "weights": jnp.ones(129), **TPU},
            "at most 128 tasks, found 129",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"x": jnp.zeros((2, 4)), "weights": jnp.ones(2)}
    with pytest.raises(ValueError, match=f"weighted_combine: .*{message}"):
        kernels.weighted_combine(**{**good, **change})


@pytest.mark.fast
@WAYS
def test_bad_leaves_are_named(options):
    with pytest.raises(ValueError, match="combine_tree: 'step/count' is int32"):
        kernels.combine_tree(
            {"step": {"count": jnp.zeros(2, jnp.int32)}}, jnp.ones(2), **options
        )
    with pytest.raises(ValueError, match="combine_tree: 'b' has 3 tasks, 'a' has 2"):
        kernels.combine_tree(
            {"a": jnp.zeros((2, 4)), "b": jnp.zeros(3)}, jnp.ones(2), **options
        )
