"""BitDelta: signs, the scale nearest in squares, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import masking, merging, tree

pytestmark = pytest.mark.fast


def draw(seed, count=2):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(count, 5, 7)), jnp.float32),
        "s": jnp.asarray(rng.normal(size=(count, 2, 3, 4)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=(count, 6)), jnp.float32),
        "n": jnp.ones((count, 2), jnp.int32),
        "e": jnp.zeros((count, 0, 3)),
    }


def base(taus):
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), taus)


def test_signs_and_mean_magnitudes():
    taus = draw(0)
    bits = merging.bitdelta(taus)
    assert set(bits.signs) == {"w", "s"} and set(bits.rest) == {"b", "n", "e"}
    signs = masking.unpack({"w": bits.signs["w"]}, {"w": taus["w"][0]})["w"]
    np.testing.assert_array_equal(signs, np.asarray(taus["w"]) >= 0)
    for t in range(2):
        got = merging.bitdelta_restore(bits, t, base(taus))
        for name in "ws":
            x = np.asarray(taus[name][t], np.float64)
            want = np.where(x >= 0, 1, -1) * np.abs(x).mean()
            np.testing.assert_allclose(np.asarray(got[name], float), want, rtol=8e-3)
        for name in "bne":
            np.testing.assert_array_equal(got[name], taus[name][t])


def test_the_scale_is_the_nearest_in_squares():
    taus = {"w": draw(1)["w"]}
    bits = merging.bitdelta(taus)

    def error(factor):
        scales = {"w": factor * bits.scales["w"]}
        got = merging.bitdelta_restore(bits._replace(scales=scales), 0, base(taus))
        return float(jnp.sum(jnp.square(got["w"] - taus["w"][0])))

    assert error(1.0) < min(error(0.99), error(1.01))
    slope = jax.grad(
        lambda scales: merging.bitdelta_restore(
            bits._replace(scales=scales), 0, base(taus)
        )["w"].sum()
    )(bits.scales)
    assert float(slope["w"][0]) == float(np.sign(taus["w"][0]).sum())


def test_one_bit_changes_come_back_exactly():
    signs = np.where(np.random.default_rng(2).random((3, 4, 5)) < 0.5, -0.5, 0.5)
    taus = {"w": jnp.asarray(signs, jnp.float32)}
    bits = merging.bitdelta(taus)
    for t in range(3):
        got = jax.jit(merging.bitdelta_restore)(bits, jnp.asarray(t), base(taus))
        np.testing.assert_array_equal(got["w"], taus["w"][t])
    zero = merging.bitdelta({"w": jnp.zeros((1, 4, 5))})
    assert not merging.bitdelta_restore(zero, 0, base(taus))["w"].any()


def test_size_own_rule_and_jit():
    taus = {"w": jnp.ones((2, 64, 64)), "v": jnp.ones((2, 64, 64))}
    bits = jax.jit(lambda taus: merging.bitdelta(taus))(taus)
    assert tree.nbytes(bits) < tree.nbytes(taus) / 31
    some = merging.bitdelta(taus, matrices=lambda name: name == "v")
    assert set(some.signs) == {"v"} and set(some.rest) == {"w"}


@pytest.mark.parametrize(
    ("task", "like", "message"),
    [
        (2, {"w": jnp.ones((5, 7))}, "task is 2, there are 2"),
        (0, {"x": jnp.ones((5, 7))}, "'w' is in only one of"),
        (0, {"w": jnp.ones((5, 9))}, r"'w' is \(5, 9\) in like"),
    ],
)
def test_refuses_by_name(task, like, message):
    bits = merging.bitdelta({"w": draw(3)["w"]})
    with pytest.raises(ValueError, match=f"bitdelta_restore: {message}"):
        merging.bitdelta_restore(bits, task, like)
