import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels
from mtl_jax.kernels.tall_pack import shapes

SCALES = np.array([0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
STACKS = [pytest.param(*case, id=str(case)) for case in shapes.STACKS]


def stack(shape, dtype=jnp.float32, seed=0):
    taus = np.random.default_rng(seed).normal(size=shape)
    taus *= np.random.default_rng(seed + 1).random(shape) < 0.7
    return jnp.asarray(taus, dtype)


def oracle(taus, scales, merged=None):
    """Masks, one task at a time, and how near each entry is to the threshold."""
    taus = np.asarray(taus, np.float64)
    merged = taus.sum(0) if merged is None else np.asarray(merged, np.float64)
    gap = np.stack([np.abs(taus) - s * np.abs(merged - taus) for s in scales])
    return merged, gap > 0, np.abs(gap) < 1e-5


def unpack(packed, shape):
    bits = np.unpackbits(np.asarray(packed), axis=-1, bitorder="little")
    return bits[..., : int(np.prod(shape))].reshape(*packed.shape[:-1], *shape) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "num_scales"), STACKS)
@pytest.mark.parametrize("interpret", [False, True], ids=["xla", "tpu"])
@pytest.mark.parametrize("given", [False, True], ids=["sum", "given"])
def test_every_implementation_matches_float64(
    shape, num_scales, dtype, interpret, given
):
    taus, scales = stack(shape, dtype), SCALES[:num_scales]
    merged = stack(shape, seed=5)[0] if given else None
    got = kernels.tall_pack(
        taus,
        scales,
        merged=merged,
        implementation="pallas_tpu" if interpret else "xla",
        interpret=interpret,
    )
    total, keep, close = oracle(taus, scales, merged)
    np.testing.assert_allclose(got.merged, total, rtol=1e-5, atol=1e-5)
    found = unpack(got.packed, shape[1:])
    zero = np.asarray(taus) == 0  # strict: a weight that did not move is not kept
    assert not found[:, zero].any()
    np.testing.assert_array_equal(found | close, keep | close)
    np.testing.assert_array_equal(got.counts, found.sum(1))
    assert got.counts.dtype == jnp.int8 and got.packed.dtype == jnp.uint8
    spare = got.packed.shape[-1] * 8 - int(np.prod(shape[1:]))
    assert (np.asarray(got.packed)[..., -1] >> (8 - spare) == 0).all() or not spare


@pytest.mark.fast
def test_empty_leaf():
    got = kernels.tall_pack(jnp.zeros((3, 0, 4)), SCALES)
    assert got.packed.shape == (5, 3, 0) and got.counts.shape == (5, 0, 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((jnp.zeros((0, 4)), SCALES), r"taus are \(0, 4\), wanted \[T, ...\]"),
        ((jnp.zeros((128, 4)), SCALES), r"T in \[1, 127\]"),
        ((jnp.zeros((2, 4), jnp.int32), SCALES), "taus are int32"),
        ((jnp.zeros((2, 4)), 0.4), r"scales are \(\), wanted \[L\]"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"tall_pack: .*{message}"):
        kernels.tall_pack(*args)
    with pytest.raises(ValueError, match=r"merged is \(3,\), wanted \(4,\)"):
        kernels.tall_pack(jnp.zeros((2, 4)), SCALES, merged=jnp.zeros(3))
