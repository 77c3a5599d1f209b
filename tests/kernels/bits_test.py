import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels

pytestmark = pytest.mark.fast


@hypothesis.given(st.integers(0, 70), st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=12)
def test_pack_is_numpy_packbits_and_unpack_undoes_it(size, seed):
    mask = np.random.default_rng(seed).random((3, size)) < 0.5
    packed = kernels.pack_bits(jnp.asarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1, bitorder="little"))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(kernels.unpack_bits(packed, size), mask)
