"""Routed layers inside Linen modules, plain and scanned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, models, routing, tree

T, D = 3, 8
IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])


def bert(scan):
    return models.Bert(
        vocab_size=13,
        width=D,
        depth=2 if scan else 1,
        num_heads=2,
        mlp_dim=10,
        max_positions=8,
        scan=scan,
    )


@pytest.fixture(scope="module", params=["plain", "scan"])
def case(request, fill):
    scan = request.param == "scan"
    module = bert(scan)
    base = fill(module, IDS)
    rng = np.random.default_rng(1)
    taus = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=(T, *x.shape)), x.dtype), base
    )
    paths = ["layers/mlp"] if scan else ["layers_0/mlp"]
    lead = (2,) if scan else ()
    return module, base, taus, paths, lead


def opened(case, **options):
    module, base, taus, paths, _ = case
    groups = {path: f"^{path}/" for path in paths}
    return routing.upscale(base, taus, groups, static_scale=0.2, **options)


def constant(case, gates):
    *_, paths, lead = case
    bias = jnp.broadcast_to(jnp.asarray(gates, jnp.float32), (*lead, T))
    return {path: {"bias": bias} for path in paths}


def random_routers(case, **options):
    *_, paths, lead = case
    return routing.init_routers(
        jax.random.key(2), paths, D, T, lead=lead, std=1.0, **options
    )


@pytest.mark.parametrize(
    ("case", "per"),
    [("plain", "example"), ("scan", "example"), ("plain", "batch")],
    indirect=["case"],
)
def test_constant_gates_are_a_merge(case, per):
    module, base, taus, paths, _ = case
    model = opened(case)
    run = jax.jit(lambda r: models.apply_routed(module, r, model, IDS, MASK, per=per))
    total = tree.add_scaled(base, merging.task_arithmetic(taus), 0.2)
    for gates in (np.eye(T)[1], np.full(T, 0.2)):
        want = tree.map_with_path(
            lambda name, b, x, t, gates=gates: (
                b + jnp.tensordot(jnp.asarray(gates, jnp.float32), x, 1)
                if "/mlp/" in name
                else t
            ),
            base,
            taus,
            total,
        )
        want = module.apply({"params": want}, IDS, MASK)
        np.testing.assert_allclose(run(constant(case, gates)), want, atol=2e-5)


@pytest.mark.parametrize("case", ["scan"], indirect=True)
def test_every_example_is_routed_by_its_own_tokens(case):
    module = case[0]
    model, routers = opened(case), random_routers(case)
    run = jax.jit(
        lambda ids, mask: models.apply_routed(
            module, routers, model, ids, mask, mask=mask
        )
    )
    got = run(IDS, MASK)
    for b in range(2):
        np.testing.assert_allclose(
            got[b], run(IDS[b : b + 1], MASK[b : b + 1])[0], atol=2e-5
        )
    # Padding does not vote: what stands there changes no token.
    other = IDS.at[1, 3].set(7)
    np.testing.assert_allclose(run(other, MASK)[1, :3], got[1, :3], atol=2e-5)
    # The other rows of a batch do not either; unless gates are averaged.
    other = IDS.at[0, 2].set(7)
    np.testing.assert_allclose(run(other, MASK)[1], got[1], atol=2e-5)
    whole = models.apply_routed(
        module, routers, model, IDS, MASK, mask=MASK, per="batch"
    )
    assert np.abs(whole - got).max() > 1e-3


@pytest.mark.parametrize("case", ["plain", "scan"], indirect=True)
def test_experts_of_rank_one_with_equal_gates_are_a_merge(case):
    """All of the rank, and biases in no group."""
    module, base, taus, paths, _ = case
    groups = {path: f"^{path}/" for path in paths}
    model = routing.rank_one(
        base,
        taus,
        groups,
        rank=8,
        matrices=lambda name, shape: name.endswith("kernel"),
    )
    routers = jax.tree.map(
        lambda x: jnp.repeat(x, 8, -1), constant(case, np.full(T, 0.2))
    )
    want = tree.add_scaled(base, merging.task_arithmetic(taus), 0.2)
    want = module.apply({"params": want}, IDS, MASK)
    got = models.apply_routed(module, routers, model, IDS, MASK)
    np.testing.assert_allclose(got, want, atol=2e-4)
    few = models.apply_routed(module, routers, model, IDS, MASK, select=2)
    assert np.isfinite(few).all()


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_gradients_reach_routers_alone(case):
    module = case[0]
    model, routers = opened(case), random_routers(case)

    @jax.jit
    def slopes(routers, model):
        def loss(routers, model):
            out = models.apply_routed(module, routers, model, IDS, MASK)
            return jnp.sum(out * jnp.arange(D, dtype=jnp.float32)[None, None])

        return jax.grad(loss, (0, 1))(routers, model)

    own, others = slopes(routers, model)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(own))
    assert not any(jnp.any(g != 0) for g in jax.tree.leaves(others))


@pytest.mark.parametrize("case", ["scan"], indirect=True)
def test_smile_with_the_only_task_is_its_expert(case):
    module, base, taus, *_ = case
    one = jax.tree.map(lambda x: x[:1], taus)
    experts = routing.smile_experts(
        one,
        rank=10,
        gate_rank=1,
        matrices=lambda name, shape: name.endswith("kernel"),
    )
    got = jax.jit(lambda e: models.apply_smile(module, base, e, IDS, MASK))(experts)
    dense = {name.rpartition("/")[0] for name in tree.paths(experts)}
    want = tree.map_with_path(
        lambda name, b, x: b + x[0] if name.rpartition("/")[0] in dense else b,
        base,
        one,
    )
    assert len(dense) == 6
    np.testing.assert_allclose(
        got, module.apply({"params": want}, IDS, MASK), atol=1e-4
    )


def test_smile_experts_by_token():
    """One layer: every token gets the experts that its own input lies with."""
    mlp = models.Mlp(features=(4,))
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    base = mlp.init(jax.random.key(0), x)["params"]
    taus = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(T, *p.shape)), p.dtype), base
    )
    experts = routing.smile_experts(taus, rank=2, gate_rank=2)
    got = models.apply_smile(mlp, base, experts, x, top_k=2)
    want = mlp.apply({"params": base}, x)
    want += routing.smile_dense(x, experts["layers_0"], top_k=2)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_refuses_by_name():
    mlp = models.Mlp(features=(4, 2))
    x = jnp.ones((3, 5))
    base = mlp.init(jax.random.key(0), x)["params"]
    taus = jax.tree.map(lambda p: jnp.stack([p] * T), base)
    model = routing.upscale(base, taus, {"layers_0": "^layers_0/"})
    routers = {"layers_0": routing.init_router(jax.random.key(1), 5, T)}
    with pytest.raises(ValueError, match="apply_routed: per is 'token'"):
        models.apply_routed(mlp, routers, model, x, per="token")
    with pytest.raises(ValueError, match=r"routers of \[\], the model has"):
        models.apply_routed(mlp, {}, model, x)
    both = routing.upscale(base, taus, {"layers_0": "kernel"})
    with pytest.raises(ValueError, match="the group 'layers_0' has leaves"):
        models.apply_routed(mlp, routers, both, x)
    other = routing.upscale(base, taus, {"mlp": "^layers_0/"})
    with pytest.raises(ValueError, match="the group 'mlp' has leaves"):
        models.apply_routed(mlp, {"mlp": routers["layers_0"]}, other, x)
    short = models.Mlp(features=(4,))
    upper = routing.upscale(base, taus, {"layers_1": "^layers_1/"})
    with pytest.raises(ValueError, match="the call reaches no module 'layers_1'"):
        models.apply_routed(short, {"layers_1": routers["layers_0"]}, upper, x)
    experts = routing.smile_experts(taus, rank=1, gate_rank=1)
    with pytest.raises(
        ValueError, match="no Dense layer of this call reads 'layers_1'"
    ):
        models.apply_smile(short, base, experts, x)
    with pytest.raises(ValueError, match="params have no 'layers_./kernel'"):
        models.apply_smile(mlp, {"other": base["layers_0"]}, experts, x)
    wrong = {**base, "layers_0": {**base["layers_0"], "kernel": jnp.ones((6, 4))}}
    with pytest.raises(ValueError, match=r"'layers_0/kernel' is \(6, 4\), the experts"):
        models.apply_smile(mlp, wrong, experts, x)
