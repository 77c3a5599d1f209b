"""RanDeS: exact for one task, and noise of mean zero for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast
KEY = jax.random.key(0)


def draw(count=3):
    rng = np.random.default_rng(0)
    return {
        "k": jnp.asarray(rng.normal(size=(count, 4, 6)), jnp.float32),
        "s": jnp.asarray(rng.normal(size=count), jnp.float32),
        "n": jnp.ones((count, 2), jnp.int32),
        "e": jnp.zeros((count, 0)),
    }


@pytest.mark.parametrize("axis", [-1, lambda path: -2 if path == "k" else -1])
def test_one_task_comes_back_exactly(axis):
    taus = draw(1)
    mixed = merging.randes(taus, key=KEY, axis=axis)
    got = merging.randes_restore(mixed, 0, key=KEY, axis=axis)
    for name in taus:
        np.testing.assert_array_equal(got[name], taus[name][0])
        assert got[name].dtype == taus[name].dtype


def test_others_are_added_under_signs_of_the_columns():
    taus = draw()
    mixed = merging.randes(taus, key=KEY, weights=[1.0, 2.0, 1.0])
    got = merging.randes_restore(mixed, 1, key=KEY)["k"]
    noise = np.asarray(got - 2 * taus["k"][1], np.float64)
    a, b = (np.asarray(taus["k"][t], np.float64) for t in (0, 2))
    for column in range(6):
        sums = [s * a[:, column] + r * b[:, column] for s in (-1, 1) for r in (-1, 1)]
        near = [np.abs(noise[:, column] - s).max() for s in sums]
        assert min(near) < 1e-5


def test_the_rest_has_mean_zero():
    taus = draw()

    def restore(key):
        mixed = merging.randes(taus, key=key)
        return merging.randes_restore(mixed, 0, key=key)["k"]

    many = np.asarray(jax.jit(jax.vmap(restore))(jax.random.split(KEY, 1000)))
    error = np.sqrt(np.square(taus["k"][1:]).sum(0) / 1000)
    assert (np.abs(many.mean(0) - taus["k"][0]) <= 5 * error).all()
    spread = many.std(0) / (error * np.sqrt(1000))
    np.testing.assert_allclose(spread, 1, atol=0.15)


def test_traced_tasks_and_other_keys():
    taus = {"w": draw()["k"].astype(jnp.bfloat16)}
    mixed = jax.jit(lambda taus: merging.randes(taus, key=KEY))(taus)
    assert mixed["w"].dtype == jnp.bfloat16
    restore = jax.jit(lambda m, t: merging.randes_restore(m, t, key=KEY)["w"])
    want = merging.randes_restore(mixed, 2, key=KEY)["w"]
    np.testing.assert_array_equal(restore(mixed, jnp.asarray(2)), want)
    other = merging.randes_restore(mixed, 2, key=jax.random.key(1))["w"]
    assert (other != want).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: merging.randes(x, key=0), "randes: key is 0"),
        (lambda x: merging.randes(x, key=KEY, axis=3), "randes: axis of 'w' is 3"),
        (
            lambda x: merging.randes_restore(x, 0, key=None),
            "randes_restore: key is None",
        ),
        (lambda x: merging.randes_restore(x, 1.5, key=KEY), "randes_restore: task is"),
        (lambda x: merging.randes_restore(x, -1, key=KEY), "randes_restore: task is"),
    ],
)
def test_refuses_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call({"w": jnp.ones((2, 3))})
