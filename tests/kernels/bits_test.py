import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 32, 33, 64, 65])
def test_pack_is_numpy_packbits_and_unpack_undoes_it(size):
    mask = np.random.default_rng(size).random((3, size)) < 0.5
    packed = kernels.pack_bits(jnp.asarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1, bitorder="little"))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(kernels.unpack_bits(packed, size), mask)
