"""Routers: what they start at, what they compute, what they average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import routing

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_router_is_the_network_it_says(depth):
    params = routing.init_router(
        jax.random.key(0), 5, 3, depth=depth, hidden=4, bias=0.3, std=1.0
    )
    x = np.random.default_rng(0).normal(size=(2, 6, 5))
    own = {name: np.asarray(p, np.float64) for name, p in params.items()}
    want = x
    if depth == 2:
        want = np.maximum(want @ own["hidden_kernel"] + own["hidden_bias"], 0)
    want = want @ own["kernel"] if depth else np.zeros((2, 6, 3))
    got = routing.router(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want + own["bias"], atol=1e-5)


def test_gates_start_near_the_bias():
    params = routing.init_router(jax.random.key(1), 8, 4, bias=0.2)
    gates = routing.router(params, jnp.ones((3, 8)))
    np.testing.assert_allclose(gates, 0.2, atol=0.05)
    assert np.ptp(gates) > 0


def test_gates_are_averaged_not_features():
    params = routing.init_router(jax.random.key(2), 5, 3, std=1.0)
    x = jax.random.normal(jax.random.key(3), (2, 4, 5))
    each = np.asarray(routing.router(params, x), np.float64)
    np.testing.assert_allclose(routing.mean_gates(params, x), each.mean(1), atol=1e-5)
    apart = routing.router(params, x.mean(1))
    assert np.abs(apart - each.mean(1)).max() > 0.05
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    got = routing.mean_gates(params, x, jnp.asarray(mask))
    np.testing.assert_allclose(got[0], each[0, :2].mean(0), atol=1e-5)
    assert not got[1].any()
    # Features without tokens are one row each.
    np.testing.assert_allclose(
        routing.mean_gates(params, x[:, 0]), each[:, 0], atol=1e-5
    )


def test_a_name_alone_decides_its_router():
    options = {"depth": 1, "std": 1.0, "lead": (2,)}
    both = routing.init_routers(jax.random.key(4), ["a", "b"], 3, 2, **options)
    one = routing.init_routers(jax.random.key(4), ["b"], 3, 2, **options)
    assert both["b"]["kernel"].shape == (2, 3, 2)
    np.testing.assert_array_equal(both["b"]["kernel"], one["b"]["kernel"])
    assert (both["a"]["kernel"] != both["b"]["kernel"]).any()


def test_refuses_by_name():
    with pytest.raises(ValueError, match="init_router: depth is 3"):
        routing.init_router(jax.random.key(0), 2, 2, depth=3)
    with pytest.raises(ValueError, match="init_router: width is 2, hidden 2, tasks 0"):
        routing.init_router(jax.random.key(0), 2, 0)
    params = routing.init_router(jax.random.key(0), 2, 2)
    with pytest.raises(ValueError, match=r"router: features are \(3, 4\)"):
        routing.router(params, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"mean_gates: mask is \(2,\)"):
        routing.mean_gates(params, jnp.ones((3, 4, 2)), jnp.ones(2))
