"""The checks of arguments that every public function shares."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import _checks

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("size", "fraction", "want"),
    [
        (10_000_099, 0.01, 100_000),
        (10_000_100, 0.01, 100_001),
        (10**9 + 99, 0.01, 10**7),
        (100, 0.29, 29),
        (100, 0.0099999999, 0),
        (86_000_001, 0.2, 17_200_000),
        (3, 1, 3),
        (3, 0, 0),
        (0, 0.5, 0),
    ],
)
def test_share_is_the_floor_of_the_decimal(size, fraction, want):
    assert _checks.share("f", "density", fraction, size) == want


def test_share_against_decimals():
    rng = np.random.default_rng(0)
    for size in rng.integers(0, 2**31, 200).tolist():
        fraction = round(float(rng.uniform()), int(rng.integers(1, 9)))
        want = int(Decimal(str(fraction)) * size)
        assert _checks.share("f", "density", fraction, size) == want


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.2", None, [0.1]])
def test_share_refuses(fraction):
    with pytest.raises(ValueError, match=r"f: density is .*wanted"):
        _checks.share("f", "density", fraction, 10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_check_finite_finds_one_entry(dtype, value):
    x = jnp.full((300, 70), jnp.finfo(dtype).max, dtype)
    _checks.check_finite("f", {"x": x, "e": jnp.zeros((0, 2))})
    with pytest.raises(ValueError, match="f: 'x' holds NaN or infinity"):
        _checks.check_finite("f", {"x": x.at[299, 69].set(value)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_check_finite_reads_once_and_stores_nothing(dtype):
    leaf = jnp.ones((512, 1024), dtype)
    compiled = jax.jit(_checks._all_finite).lower([leaf]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < leaf.nbytes / 8
    assert compiled.cost_analysis()["bytes accessed"] < 1.1 * leaf.nbytes
