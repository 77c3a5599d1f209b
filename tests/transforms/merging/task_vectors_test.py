"""Task vectors of trees of every framework, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree


def test_difference_is_taken_in_float32():
    base = {"w": jnp.full(2, 1 + 2**-7, jnp.bfloat16)}
    expert = {"w": jnp.full(2, 257, jnp.float32)}
    taus = merging.task_vectors(base, [expert, base])
    assert taus["w"].dtype == jnp.float32
    # bfloat16 has no number between 256 and 258.
    assert taus["w"].tolist() == [[256 - 2**-7] * 2, [0.0, 0.0]]


def test_integers_become_zeros_and_survive_the_round_trip():
    base = {"w": jnp.ones(2), "n": jnp.arange(3), "f": jnp.array([True])}
    expert = {"w": jnp.zeros(2), "n": jnp.arange(3) + 5, "f": jnp.array([False])}
    taus = merging.task_vectors(base, [expert])
    assert taus["n"].dtype == base["n"].dtype and not taus["n"].any()
    for merge in (merging.ties, merging.breadcrumbs, merging.task_arithmetic):
        moved = tree.add_scaled(base, merge(taus), 1.0)
        np.testing.assert_array_equal(moved["n"], base["n"])
        np.testing.assert_array_equal(moved["f"], base["f"])


def test_base_plus_one_task_is_the_expert():
    base = {"w": jax.random.normal(jax.random.key(0), (5,)).round(2)}
    expert = {"w": base["w"] + 0.5}
    taus = merging.task_vectors(base, [expert])
    delta = merging.ties(taus, density=1.0)
    got = tree.add_scaled(base, delta, 1.0)
    np.testing.assert_allclose(got["w"], expert["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([], "no experts"),
        ({"w": jnp.ones((4, 3))}, "experts is one tree"),
        (
            [{"w": jnp.ones((4, 3))}, {"w": jnp.ones((5, 3))}],
            "'w' is .5, 3. in expert 1",
        ),
        ([{"v": jnp.ones((4, 3))}], "'w' is in base but not in expert 0"),
        ([{"w": jnp.full((4, 3), jnp.nan)}], "expert 0: 'w' holds NaN"),
    ],
)
def test_refuses_by_name(experts, message):
    with pytest.raises(ValueError, match=f"task_vectors: {message}"):
        merging.task_vectors({"w": jnp.ones((4, 3))}, experts)


def test_finite_check_can_be_switched_off():
    taus = merging.task_vectors(
        {"w": jnp.ones(1)}, [{"w": jnp.full(1, jnp.inf)}], check_finite=False
    )
    assert jnp.isinf(taus["w"]).all()


def pipeline(base, experts):
    taus = merging.task_vectors(base, experts)
    return tree.add_scaled(base, merging.ties(taus, density=0.5), 0.5)


def _moved(base, t):
    def leaf(x):
        noise = jax.random.normal(jax.random.key(t + x.size), x.shape)
        return x + noise.astype(x.dtype)

    return jax.tree.map(leaf, base)


def _check_like_dict(base):
    experts = [_moved(base, t) for t in range(3)]
    got = pipeline(base, experts)
    assert jax.tree.structure(got) == jax.tree.structure(base)
    plain = [dict(enumerate(jax.tree.leaves(t))) for t in (base, *experts)]
    want = pipeline(plain[0], plain[1:])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nnx_state():
    nnx = pytest.importorskip("flax.nnx")
    _, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    _check_like_dict(state)


def test_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="keep only the arrays"):
        merging.task_vectors(model, [model])
    _check_like_dict(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.parametrize(
    ("base", "experts", "message"),
    [
        ({"w": jnp.zeros(2)}, None, "experts is a NoneType, wanted a sequence"),
        ({"w": jnp.zeros(2)}, 5, "experts is a int, wanted a sequence"),
        ({}, [{}], "no leaf of base is floating point"),
        ({"w": jnp.arange(2)}, [{"w": jnp.arange(2)}], "no leaf of base"),
        (
            {"s": np.array(["x"], object), "w": jnp.zeros(2)},
            [{"s": np.array(["x"], object), "w": jnp.zeros(2)}],
            "'s' in base has dtype object",
        ),
    ],
)
def test_what_is_no_family_of_experts(base, experts, message):
    with pytest.raises(ValueError, match=f"task_vectors: .*{message}"):
        merging.task_vectors(base, experts)
