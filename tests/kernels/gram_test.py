import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels, tree
from mtl_jax.kernels.gram import ref, shapes

TPU = {"implementation": "pallas_tpu", "interpret": True}
WAYS = pytest.mark.parametrize("options", [{}, TPU], ids=["xla", "tpu"])
STACKS = [pytest.param(shape, id=str(shape)) for shape in shapes.STACKS]


def stack(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def oracle(x):
    x = np.asarray(x, np.float64).reshape(x.shape[0], -1)
    return x @ x.T


def close(got, want, tolerance=2e-6):
    """Against the largest product: what cancels has lost its digits already."""
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", STACKS)
def test_kernel_matches_float64(shape, dtype):
    x = stack(shape, dtype)
    got = kernels.gram(x, **TPU)
    close(got, oracle(x))
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", STACKS)
def test_default_and_definition_match_float64(shape, dtype):
    x = stack(shape, dtype)
    # XLA on CPUs sums products of narrow floats one after the other.
    # XLA may sum products of half precision in its own order.
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-5
    close(kernels.gram(x), oracle(x), tolerance)
    close(ref.gram(x), oracle(x), tolerance)
    np.testing.assert_array_equal(kernels.gram(x), kernels.gram(x).T)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 40, 1100), id="rows: several blocks of lanes"),
        pytest.param((2, 270, 1000), id="rows: several blocks of both"),
        pytest.param((17, 70, 1030), id="matrix unit: several blocks"),
        pytest.param((128, 8300), id="flat: several blocks"),
        pytest.param((3, 1, 33000), id="one long row"),
    ],
)
def test_kernel_sums_over_blocks(shape):
    x = stack(shape)
    close(kernels.gram(x, **TPU), oracle(x))


@WAYS
def test_tree_is_the_sum_over_its_leaves(options, monkeypatch):
    from mtl_jax.kernels import tpu_tasks

    monkeypatch.setattr(tpu_tasks, "_ALONE", 600)
    monkeypatch.setattr(tpu_tasks, "_PACK", 300)
    leaves = {
        "bias": stack((3, 130), seed=1),
        "empty": jnp.zeros((3, 0, 4)),
        "kernel": stack((3, 5, 140), seed=2),  # alone
        "narrow": stack((3, 40), jnp.bfloat16, seed=3),
        "scale": stack((3,), seed=4),
        "second": stack((3, 2, 128), seed=5),  # in a second pack
    }
    if options:
        planned = tpu_tasks.plan(jax.tree.leaves(leaves))
        assert planned == [(2,), (0, 4), (5,), (3,)]
    got = kernels.gram_tree(leaves, **options)
    close(got, sum(oracle(x) for x in leaves.values()), 1e-5)
    np.testing.assert_allclose(got, tree.gram(leaves), rtol=1e-4, atol=1e-4)


@pytest.mark.fast
@WAYS
def test_no_entries_give_zeros(options):
    np.testing.assert_array_equal(
        kernels.gram(jnp.zeros((3, 0, 4)), **options), np.zeros((3, 3))
    )


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (3, 2, 130), (17, 2, 130)])
def test_nan_spoils_its_task_and_no_other(shape, options):
    x = stack(shape).at[(1,) + (0,) * (len(shape) - 1)].set(jnp.nan)
    bad = np.isnan(np.asarray(kernels.gram(x, **options)))
    wanted = np.zeros_like(bad)
    wanted[1] = wanted[:, 1] = True
    np.testing.assert_array_equal(bad, wanted)


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 130)])
def test_derivatives_are_those_of_the_definition(shape, options):
    x, weight = stack(shape), stack((shape[0], shape[0]), seed=1)

    def loss(way):
        return lambda x: (weight * way(x)).sum()

    fast = loss(lambda x: kernels.gram(x, **options))
    for derive in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(
            derive(fast)(x), derive(loss(ref.gram))(x), rtol=1e-5, atol=1e-5
        )
    narrow = jax.grad(fast)(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and narrow.shape == shape
    curve = jax.jvp(jax.grad(fast), (x,), (x,))[1]
    np.testing.assert_allclose(curve, jax.grad(fast)(x), rtol=1e-5, atol=1e-5)


@WAYS
@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 130), (17, 2, 130)])
def test_vmap_is_one_gramian_each(shape, options):
    batch = jnp.stack([stack(shape, seed=s) for s in range(3)], axis=1)
    got = jax.vmap(lambda x: kernels.gram(x, **options), in_axes=1)(batch)
    for s in range(3):
        close(got[s], oracle(batch[:, s]))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.zeros((2, 4), jnp.int32), {}, "x is int32, wanted a float"),
        (jnp.zeros((2, 4), jnp.complex64), {}, "x is complex64"),
        (jnp.zeros(()), {}, r"x is \(\), wanted \[T, ...\]"),
        (jnp.zeros((0, 4)), {}, r"x is \(0, 4\), wanted \[T, ...\]"),
        (jnp.zeros((2, 4)), {"implementation": "cuda"}, "'cuda' does not exist"),
        (
            jnp.zeros((2, 4)),
            {"implementation": "pallas_tpu"},
            "needs a TPU, found an array on cpu",
        ),
        (jnp.zeros((2, 4), jnp.float16), TPU, "float32 and bfloat16, found float16"),
        (jnp.zeros((129, 4)), TPU, "at most 128 tasks, found 129"),
    ],
)
def test_bad_arguments_are_named(x, options, message):
    with pytest.raises(ValueError, match=f"gram: .*{message}"):
        kernels.gram(x, **options)


@pytest.mark.fast
@WAYS
def test_bad_leaves_are_named(options):
    with pytest.raises(ValueError, match="gram_tree: 'step/count' is int32"):
        kernels.gram_tree({"step": {"count": jnp.zeros(2, jnp.int32)}}, **options)
    with pytest.raises(ValueError, match="gram_tree: 'b' has 3 tasks, 'a' has 2"):
        kernels.gram_tree({"a": jnp.zeros((2, 4)), "b": jnp.zeros(3)}, **options)
    with pytest.raises(ValueError, match="gram_tree: the tree of tasks has no leaves"):
        kernels.gram_tree({}, **options)
