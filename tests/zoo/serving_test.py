import pytest

from mtl_jax import decoding
from mtl_jax.zoo import serving

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "teacher"}, "row 'x': role is 'teacher', wanted one of"),
        ({}, "row 'x': fuse goes with role 'fused'"),
        ({"role": "small", "fuse": decoding.StaticFusion()}, "fuse goes with role"),
    ],
)
def test_rows_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        serving.Steered(name="x", **options)
