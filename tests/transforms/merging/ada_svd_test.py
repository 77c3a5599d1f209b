"""AdaSVD: loads as coefficients of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def draw(count=3):
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (2, 4, 5), "bias": (2, 5)}, "norm": (4,)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("others", ["mean", "base"])
def test_layers_have_coefficients_of_their_own(others):
    taus = draw()
    load = np.random.default_rng(1).dirichlet(np.ones(3), 2)
    loads = {"dense": {k: jnp.asarray(load, jnp.float32) for k in ("kernel", "bias")}}
    scale, weights = np.array([1.0, 2.0, 0.5]), np.array([1.0, 0.5, 2.0])
    run = jax.jit(
        lambda t, c: merging.ada_svd(t, c, scale=scale, weights=weights, others=others)
    )
    got = run(taus, loads)
    for name, axes in (("kernel", "tlio,lt->lio"), ("bias", "tlo,lt->lo")):
        want = np.einsum(axes, taus["dense"][name], load * scale * weights)
        np.testing.assert_allclose(got["dense"][name], want, atol=1e-5)
    want = np.average(taus["norm"], axis=0, weights=weights)
    want = want if others == "mean" else np.zeros(4)
    np.testing.assert_allclose(got["norm"], want, atol=1e-6)


def test_equal_tasks_one_task_and_dtypes():
    taus = jax.tree.map(lambda x: jnp.stack([x[0]] * 3).astype(jnp.bfloat16), draw())
    loads = {"dense": {"kernel": jnp.full((2, 3), 1 / 3)}}
    got = merging.ada_svd(taus, loads)
    assert got["dense"]["kernel"].dtype == jnp.bfloat16
    one = jax.tree.map(lambda x: np.asarray(x[0], np.float32), taus)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=1e-2
        ),
        got,
        one,
    )
    single = jax.tree.map(lambda x: x[:1], draw())
    got = merging.ada_svd(single, {"norm": jnp.ones(1)})
    np.testing.assert_array_equal(got["norm"], single["norm"][0])


def test_errors():
    taus = draw()
    with pytest.raises(ValueError, match="ada_svd: there is no load in loads"):
        merging.ada_svd(taus, {})
    with pytest.raises(ValueError, match=r"ada_svd: the load of 'norm' is \(2,\)"):
        merging.ada_svd(taus, {"norm": jnp.ones(2)})
    with pytest.raises(ValueError, match="ada_svd: the load of 'x' .* no leaf"):
        merging.ada_svd(taus, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="ada_svd: others is"):
        merging.ada_svd(taus, {"norm": jnp.ones(3)}, others="zero")
    with pytest.raises(ValueError, match=r"ada_svd: scale is \(2,\)"):
        merging.ada_svd(taus, {"norm": jnp.ones(3)}, scale=[1.0, 2.0])
