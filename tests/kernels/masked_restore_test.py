import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels
from mtl_jax.kernels.masked_restore import shapes

SHAPES = [pytest.param(shape, id=str(shape)) for shape in shapes.LEAVES]


def case(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    base = jnp.asarray(rng.normal(size=shape), dtype)
    delta = jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = rng.random(shape) < 0.4
    packed = jnp.asarray(np.packbits(mask.reshape(-1), bitorder="little"))
    assert packed.size == -(-size // 8)
    return base, delta, mask, packed


def oracle(base, delta, mask, scale):
    out = np.asarray(base, np.float64)
    return out + scale * np.where(mask, np.asarray(delta, np.float64), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((0, 4), id="empty")])
@pytest.mark.parametrize("options", [{}, {"interpret": True}], ids=["xla", "tpu"])
def test_every_implementation_matches_float64(shape, dtype, options):
    name = "pallas_tpu" if options else "xla"
    base, delta, mask, packed = case(shape, dtype)
    got = kernels.masked_restore(
        base, delta, packed, scale=0.75, implementation=name, **options
    )
    assert got.dtype == dtype and got.shape == shape
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        oracle(base, delta, mask, 0.75),
        rtol=tolerance,
        atol=tolerance,
    )
    # At scale 1 no multiplication rounds, so implementations agree bit for bit.
    got = kernels.masked_restore(base, delta, packed, implementation=name, **options)
    want = kernels.masked_restore(base, delta, packed)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.fast
def test_entries_outside_the_mask_keep_their_bits():
    base, delta, mask, packed = case((33, 65), jnp.bfloat16)
    got = kernels.masked_restore(base, delta * jnp.nan, packed)
    np.testing.assert_array_equal(np.asarray(got)[~mask], np.asarray(base)[~mask])
    assert np.isnan(np.asarray(got, np.float32)[mask]).all()


@pytest.mark.parametrize("options", [{}, {"interpret": True}], ids=["xla", "tpu"])
def test_gradients_are_those_of_the_definition(options):
    base, delta, mask, packed = case((33, 65))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(33, 65)), jnp.float32)

    def loss(base, delta, scale):
        out = kernels.masked_restore(
            base,
            delta,
            packed,
            scale=scale,
            implementation="pallas_tpu" if options else None,
            **options,
        )
        return (weight * out).sum()

    def plain(base, delta, scale):
        return (weight * (base + scale * jnp.where(mask, delta, 0.0))).sum()

    args = (base, delta, jnp.float32(0.3))
    for got, want in zip(
        jax.grad(loss, (0, 1, 2))(*args), jax.grad(plain, (0, 1, 2))(*args), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_vmap_over_masks_restores_every_task():
    base, delta, _, _ = case((300, 128))
    packed = jnp.stack([case((300, 128), seed=s)[3] for s in range(3)])
    for options in ({}, {"implementation": "pallas_tpu", "interpret": True}):
        got = jax.vmap(
            lambda p, options=options: kernels.masked_restore(base, delta, p, **options)
        )(packed)
        want = [kernels.masked_restore(base, delta, p) for p in packed]
        np.testing.assert_array_equal(got, jnp.stack(want))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"packed": jnp.zeros(3, jnp.uint8)},
            r"packed is uint8\[3\], wanted uint8\[2\]",
        ),
        ({"packed": jnp.zeros(2, jnp.int32)}, r"packed is int32\[2\]"),
        ({"delta": jnp.zeros(9)}, r"delta is \(9,\), base is \(10,\)"),
        ({"base": jnp.zeros(10, jnp.int32)}, "base is int32, wanted a float"),
        ({"scale": jnp.ones(2)}, "wanted a scalar"),
        ({"implementation": "cuda"}, "implementation 'cuda' does not exist"),
        ({"implementation": "pallas_tpu"}, "needs a TPU, found an array on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "base": jnp.zeros(10),
        "delta": jnp.zeros(10),
        "packed": jnp.zeros(2, jnp.uint8),
    }
    with pytest.raises(ValueError, match=f"masked_restore: .*{message}"):
        kernels.masked_restore(**{**good, **change})


@pytest.mark.fast
def test_compiled_kernel_takes_narrow_floats_only():
    base = jnp.zeros(8, jnp.float16)
    with pytest.raises(ValueError, match="takes float32 and bfloat16, found float16"):
        kernels.masked_restore(
            base, base, jnp.zeros(1, jnp.uint8), implementation="pallas_tpu"
        )
