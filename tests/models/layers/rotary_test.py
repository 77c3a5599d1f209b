import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import rotary, rotary_frequencies

pytestmark = pytest.mark.fast

LLAMA_3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 64,
}


def test_frequencies_are_the_paper():
    want = [10000.0 ** (-2 * i / 8) for i in range(4)]
    np.testing.assert_allclose(rotary_frequencies(8, 1e4), want, rtol=1e-7)
    halved = rotary_frequencies(8, 1e4, {"type": "linear", "factor": 2.0})
    np.testing.assert_allclose(2 * halved, want, rtol=1e-7)


def test_llama_3_stretches_the_slow_and_keeps_the_fast():
    plain = rotary_frequencies(32, 500.0).astype(np.float64)
    got = rotary_frequencies(32, 500.0, LLAMA_3)
    kinds = set()
    for rate, found in zip(plain, got, strict=True):
        wavelength = 2 * np.pi / rate
        if wavelength < 64 / 4:
            want, kind = rate, "kept"
        elif wavelength > 64 / 1:
            want, kind = rate / 8, "divided"
        else:
            blend = (64 / wavelength - 1) / (4 - 1)
            want, kind = (1 - blend) * rate / 8 + blend * rate, "blended"
        np.testing.assert_allclose(found, want, rtol=1e-6)
        kinds.add(kind)
    assert kinds == {"kept", "divided", "blended"}


def test_rotation_turns_pairs_of_the_halves():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 6)).astype(np.float32)
    positions = np.array([[0, 4, 9]], np.int32)
    rates = rotary_frequencies(6, 100.0)
    got = rotary.rotate(x, *rotary.rotary_tables(positions, rates))
    for token, position in enumerate(positions[0]):
        turn = np.exp(1j * position * rates.astype(np.float64))
        pairs = (x[0, token, :, :3] + 1j * x[0, token, :, 3:]) * turn
        np.testing.assert_allclose(got[0, token, :, :3], pairs.real, atol=1e-6)
        np.testing.assert_allclose(got[0, token, :, 3:], pairs.imag, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rates = rotary_frequencies(8, 1e4)

    def product(i, j):
        turned = (
            rotary.rotate(x, *rotary.rotary_tables(np.array([[n]]), rates))
            for x, n in ((query, i), (key, j))
        )
        return float(jnp.sum(next(turned) * next(turned)))

    assert product(3, 1) == pytest.approx(product(203, 201), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_half_precision_is_rotated_in_full():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    tables = rotary.rotary_tables(np.array([[1000]]), rotary_frequencies(4, 1e4))
    got = rotary.rotate(x, *tables)
    assert got.dtype == jnp.bfloat16
    want = rotary.rotate(x.astype(jnp.float32), *tables)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 1e4), "head_dim must be even, is 5"),
        ((4, 1e4, {"type": "yarn", "factor": 2.0}), "no scaling 'yarn', known: 'lin"),
        ((4, 1e4, {"factor": 2.0}), "no scaling None"),
        ((4, 1e4, {"type": "linear"}), "scaling 'linear' lacks 'factor'"),
        (
            (4, 1e4, {k: v for k, v in LLAMA_3.items() if "high" not in k}),
            "lacks 'high_freq_factor'",
        ),
        ((4, 1e4, {**LLAMA_3, "low_freq_factor": 4.0}), "must be below"),
    ],
)
def test_scalings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"rotary_frequencies: .*{message}"):
        rotary_frequencies(*arguments)
