"""Random bits that are a function of key and index."""

import jax
import numpy as np
import pytest

from mtl_jax.checkpoints import _draw_programs as programs

LENGTH = 1 << 16
draw = jax.jit(programs.random_bits, static_argnums=2)


def bits(key, start=0):
    start = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
    return np.asarray(draw(np.array(key, np.uint32), start, LENGTH))


def mixed(x):
    """The mixing of 32 bits in plain integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_definition_across_the_end_of_32_bits():
    start = 2**32 - 5
    found = bits((12345, 678), start)
    for i in (0, 4, 5, 1000):
        low, high = (start + i) % 2**32, (start + i) >> 32
        inner = mixed((low + 12345) % 2**32)
        wanted = mixed((inner + 678 + high * 0x9E3779B9) % 2**32)
        assert found[i] == wanted


@pytest.mark.parametrize("start", [0, 3 * LENGTH, 2**40])
def test_depends_on_the_index_alone(start):
    assert (bits((1, 2), start)[5:] == bits((1, 2), start + 5)[:-5]).all()


def share(x):
    return x.astype(np.float64) / 2**32


@pytest.mark.parametrize("key", [(0, 0), (1, 0), (0, 1), (2**31, 7)])
def test_uniform(key):
    counts = np.histogram(share(bits(key)), 256, (0, 1))[0]
    expected = LENGTH / 256
    square = ((counts - expected) ** 2 / expected).sum()
    assert 255 - 6 * np.sqrt(510) < square < 255 + 6 * np.sqrt(510)
    # Every bit by itself, too.
    each = [((bits(key) >> i) & 1).mean() for i in range(32)]
    np.testing.assert_allclose(each, 0.5, rtol=0, atol=0.01)


@pytest.mark.parametrize("step", [1, 2, 64, 768, 1024])
def test_neighbours_are_independent(step):
    u = share(bits((3, 4)))
    assert abs(np.corrcoef(u[step:], u[:-step])[0, 1]) < 0.02


@pytest.mark.parametrize("other", [(10**6, 4), (3, 5), (5, 3), (2**31 + 3, 4)])
def test_keys_are_independent(other):
    a, b = bits((3, 4)), bits(other)
    for shift in (0, 1, 2, 100):
        u, v = share(a[shift:]), share(b[: LENGTH - shift])
        assert abs(np.corrcoef(u, v)[0, 1]) < 0.02
    flips = [((a ^ b) >> i & 1).mean() for i in range(32)]
    np.testing.assert_allclose(flips, 0.5, rtol=0, atol=0.012)
