"""What every aggregator that is no plain Gramian rule owes, and the combinators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import aggregation as agg

COUNT = 4
METHODS = {
    "config": agg.config,
    "cr_mogm": lambda: agg.cr_mogm(agg.imtl_g(), COUNT),
    "db_mtl": lambda: agg.db_mtl(COUNT),
    "every_k": lambda: agg.every_k(agg.imtl_g(), COUNT, 2),
    "excess_mtl": lambda: agg.excess_mtl(COUNT),
    "grad_drop": lambda: agg.grad_drop(leak=0.25),
    "moco": lambda: agg.moco(COUNT),
    "modo": lambda: agg.modo(COUNT),
    "nash_mtl": lambda: agg.nash_mtl(COUNT, every=2),
    "normalize": lambda: agg.normalize(agg.trimmed_mean()),
    "per_leaf": lambda: agg.per_leaf(agg.random()),
    "sdm_grad": lambda: agg.sdm_grad(COUNT),
    "trimmed_mean": agg.trimmed_mean,
    "with_preference": lambda: agg.with_preference(agg.db_mtl(COUNT), [1.0] * COUNT),
}
EXTRA = {"losses": jnp.ones(COUNT), "cross_gram": jnp.eye(COUNT)}
each = pytest.mark.parametrize("name", METHODS)


def params_of():
    return {
        "half": jnp.zeros((3, 4), jnp.bfloat16),
        "number": jnp.zeros((), jnp.int32),
        "wide": jnp.zeros((8, 16)),
    }


@functools.cache
def grads_of(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(COUNT, *p.shape)) * 3).astype(p.dtype),
        params_of(),
    )


@each
def test_updates_look_like_params_and_states_like_themselves(name):
    tx = METHODS[name]()
    params = params_of()
    state = tx.init(params)
    step = jax.jit(lambda g, s: tx.update(g, s, params, **EXTRA), donate_argnums=1)
    want = jax.eval_shape(lambda: state)
    for seed in range(2):
        updates, state = step(grads_of(seed), state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
            lambda x: (x.shape, x.dtype), params
        )
        assert jax.eval_shape(lambda s=state: s) == want
        assert np.isfinite(updates["wide"]).all()
        assert bool(state.finite)
    assert step._cache_size() == 1


@each
def test_nan_is_flagged_and_not_hidden(name):
    tx = METHODS[name]()
    grads = dict(grads_of())
    grads["wide"] = grads["wide"].at[1, 2, 3].set(jnp.nan)
    updates, state = tx.update(grads, tx.init(params_of()), **EXTRA)
    assert not bool(state.finite)
    assert np.isnan(updates["wide"][2, 3])


@each
def test_sharded_is_unsharded(name):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    tx = METHODS[name]()
    grads = {"wide": grads_of()["wide"]}
    params = {"wide": params_of()["wide"]}
    update = jax.jit(lambda g, s: tx.update(g, s, None, **EXTRA)[0])
    want = update(grads, tx.init(params))["wide"]
    spec = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    found = update(jax.device_put(grads, spec), tx.init(params))["wide"]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        agg.config,
        agg.imtl_g,
        agg.aligned_mtl,
        lambda: agg.excess_mtl(1),
        lambda: agg.moco(1, normalize=False, beta=1.0),
        lambda: agg.trimmed_mean(trim=0),
        lambda: agg.grad_drop(),
        lambda: agg.fair_grad(alpha=0),
        lambda: agg.modo(1),
        lambda: agg.sdm_grad(1),
        agg.random,
    ],
)
def test_one_task_keeps_its_gradient(make):
    tx = make()
    grads = {"w": jnp.array([[3.0, -4.0]])}
    extra = {"losses": jnp.ones(1), "cross_gram": jnp.eye(1)}
    updates, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}), **extra)
    np.testing.assert_allclose(updates["w"], [3.0, -4.0], rtol=1e-4)


ABSENT = {
    "aligned_mtl": lambda count: agg.aligned_mtl(),
    "cagrad": lambda count: agg.cagrad(),
    "config": lambda count: agg.config(),
    "db_mtl": agg.db_mtl,
    "dual_proj": lambda count: agg.dual_proj(),
    "excess_mtl": agg.excess_mtl,
    "fair_grad": lambda count: agg.fair_grad(),
    "grad_vac": agg.grad_vac,
    "imtl_g": lambda count: agg.imtl_g(),
    "mean": lambda count: agg.mean(),
    "mgda": lambda count: agg.mgda(),
    "mgda by losses": lambda count: agg.mgda(normalize="loss"),
    "moco": agg.moco,
    "modo": agg.modo,
    "nash_mtl": agg.nash_mtl,
    "pcgrad": lambda count: agg.pcgrad(),
    "sdm_grad": agg.sdm_grad,
    "upgrad": lambda count: agg.upgrad(),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_task_turns_nothing(name):
    """The direction is that of the tasks that are there, over three steps."""
    rng = np.random.default_rng(1)
    jacobian = rng.normal(size=(4, 6)).astype(np.float32)
    jacobian[2] = 0
    there = np.array([0, 1, 3])

    def run(rows, present):
        tx = ABSENT[name](len(rows))
        state = tx.init({"w": jnp.zeros(6)})
        for step in range(3):
            g = jnp.asarray(rows * (1 + 0.1 * step))
            extra = {
                "losses": jnp.asarray(present, jnp.float32),
                "present": jnp.asarray(present),
                "cross_gram": g @ g.T,
            }
            out, state = tx.update({"w": g}, state, **extra)
        return np.asarray(out["w"], np.float64)

    found = run(jacobian, np.array([True, True, False, True]))
    want = run(jacobian[there], np.ones(3, bool))
    cosine = found @ want / np.linalg.norm(found) / np.linalg.norm(want)
    assert cosine > 1 - 1e-5
    # Means over tasks are means over all of them.
    assert 0.5 < np.linalg.norm(found) / np.linalg.norm(want) < 1.01


def test_present_wants_one_flag_per_task():
    for name in ("cagrad", "mgda", "modo", "sdm_grad"):
        with pytest.raises(ValueError, match=f"{name}: present is .3,., wanted .4,."):
            getattr(agg.weights, name)(jnp.eye(4), present=jnp.ones(3, bool))
