"""The seven points that the method owes, on quadratics and a small net."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation, train

RNG = np.random.default_rng(0)
MODES = ("direct", "each", "individual", "second")
METHODS = {
    "sum": aggregation.sum,
    "mean": aggregation.mean,
    "pcgrad": aggregation.pcgrad,
    "aligned_mtl": aggregation.aligned_mtl,
    "cagrad": aggregation.cagrad,
    "config": aggregation.config,
    "fair_grad": aggregation.fair_grad,
    "imtl_g": aggregation.imtl_g,
    "mgda": aggregation.mgda,
    "nash_mtl": lambda: aggregation.nash_mtl(3),
    "upgrad": aggregation.upgrad,
}


def flat_of(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def rows(seed=0, tasks=3):
    rng = np.random.default_rng(seed)
    shapes = {"a": (tasks, 2, 3), "b": (tasks, 4)}
    draw = {k: rng.normal(size=v) for k, v in shapes.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw)


PARAMS = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


@pytest.mark.fast
def test_perturbation_has_length_rho_and_the_gradient_direction():
    g = {"a": jnp.array([[3.0], [0.0]]), "b": jnp.array(4.0)}
    step = aggregation.sam_perturbation(g, 0.5)
    np.testing.assert_allclose(flat_of(step), 0.1 * flat_of(g), rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, g)
    close(aggregation.sam_perturbation(zero, 0.5), zero)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e18])
def test_perturbation_ignores_the_scale_of_the_loss(scale):
    g = {"a": jnp.array([3.0, -4.0])}
    scaled = jax.tree.map(lambda x: x * scale, g)
    step = aggregation.sam_perturbation(scaled, 0.1)
    close(step, aggregation.sam_perturbation(g, 0.1))


def test_modes_by_hand():
    g, s, method = rows(0), rows(1), aggregation.pcgrad(seed=3)
    f = jax.tree.map(jnp.subtract, s, g)

    @jax.jit
    def run(x):
        return method.update(x, method.init(PARAMS))[0]

    def pair(x, y):
        return run(jax.tree.map(lambda a, b: jnp.stack([a, b]), x, y))

    def task(x, t):
        return jax.tree.map(lambda a: a[t], x)

    each = [pair(task(g, t), task(f, t)) for t in range(3)]
    want = {
        "individual": jax.tree.map(jnp.add, run(g), run(f)),
        "direct": run(s),
        "second": pair(run(g), run(f)),
        "each": run(jax.tree.map(lambda *x: jnp.stack(x), *each)),
    }
    for mode in MODES:
        flat = aggregation.flat_mtl(method, mode=mode, num_tasks=3)
        got, state = jax.jit(flat.update)(g, flat.init(PARAMS), PARAMS, sam_grads=s)
        close(got, want[mode])
        assert bool(state.finite)


@pytest.mark.parametrize("name", METHODS)
def test_1_without_radius_it_is_the_aggregator(name):
    g, method = rows(), METHODS[name]()
    want, _ = method.update(g, method.init(PARAMS))
    for mode in ("individual", "direct"):
        flat = aggregation.flat_mtl(method, mode=mode)
        got, _ = flat.update(g, flat.init(PARAMS), sam_grads=g)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", ["fair_grad", "nash_mtl"])
def test_rounding_is_no_flatness(name):
    g, method = rows(), METHODS[name]()
    s = jax.tree.map(lambda x, y: x * (1 + 1e-7 * y), g, rows(1))
    want, _ = method.update(g, method.init(PARAMS))
    flat = aggregation.flat_mtl(method)
    close(flat.update(g, flat.init(PARAMS), sam_grads=s)[0], want)
    loose = aggregation.flat_mtl(method, floor=0)
    moved, _ = loose.update(g, loose.init(PARAMS), sam_grads=s)
    assert np.linalg.norm(flat_of(moved) - flat_of(want)) > 0.3
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), s)
    out, state = flat.update(g, flat.init(PARAMS), sam_grads=bad)
    assert np.isnan(flat_of(out)).any() and not state.finite


@pytest.mark.fast
def test_2_for_a_sum_splitting_changes_nothing():
    g, s = rows(0), rows(1)
    want = jax.tree.map(lambda x: jnp.sum(x, 0), s)
    for mode in MODES:
        flat = aggregation.flat_mtl(aggregation.sum(), mode=mode, num_tasks=3)
        got, _ = flat.update(g, flat.init(PARAMS), sam_grads=s)
        close(got, want, atol=1e-5)


def problem(seed=0, shared=3, own=2, tasks=2):
    """Quadratics over shared coordinates and each task's own."""
    rng = np.random.default_rng(seed)
    size = shared + own
    roots = rng.normal(size=(tasks, size, size))
    hessians = roots @ roots.transpose(0, 2, 1)
    x = {
        "trunk": rng.normal(size=shared),
        "heads": {str(t): rng.normal(size=own) for t in range(tasks)},
    }
    h = jnp.asarray(hessians, jnp.float32)

    def loss_fn(params):
        both = [
            jnp.concatenate([params["trunk"], params["heads"][str(t)]])
            for t in range(tasks)
        ]
        return jnp.stack([v @ h[t] @ v / 2 for t, v in enumerate(both)])

    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), x)
    return loss_fn, params, hessians


def unit(x):
    return x / np.linalg.norm(x)


def test_3_one_task_is_sam_with_a_norm_for_each_part():
    loss_fn, params, hessians = problem(tasks=1)
    flat = aggregation.value_and_flat_grads(
        loss_fn,
        aggregation.mean(),
        rho_shared=0.3,
        rho_task=0.7,
        shared=("^trunk",),
    )
    _, grads, _ = flat.update(params, flat.init(params))
    v = np.concatenate([params["trunk"], params["heads"]["0"]])
    g = hessians[0] @ v
    moved = v + np.concatenate([0.3 * unit(g[:3]), 0.7 * unit(g[3:])])
    want = hessians[0] @ moved
    np.testing.assert_allclose(grads["trunk"], want[:3], rtol=1e-4)
    np.testing.assert_allclose(grads["heads"]["0"], want[3:], rtol=1e-4)


def test_3_without_heads_it_is_plain_sam():
    loss_fn, params, hessians = problem(tasks=1)
    flat = aggregation.value_and_flat_grads(loss_fn, aggregation.mean(), rho_shared=0.3)
    _, grads, _ = flat.update(params, flat.init(params))
    v = np.concatenate([params["trunk"], params["heads"]["0"]])
    want = hessians[0] @ (v + 0.3 * unit(hessians[0] @ v))
    got = np.concatenate([grads["trunk"], grads["heads"]["0"]])
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.fast
def test_4_flatness_of_a_quadratic_in_closed_form():
    loss_fn, params, hessians = problem(tasks=3)
    found = aggregation.flat_task_grads(
        loss_fn, rho_shared=0.3, rho_task=0.7, shared=("^trunk",)
    )(params)
    for t, h in enumerate(hessians):
        v = np.concatenate([params["trunk"], params["heads"][str(t)]])
        g = h @ v
        want = 0.3 * h[:3, :3] @ unit(g[:3]) + 0.7 * h[:3, 3:] @ unit(g[3:])
        got = found.shared_sam["trunk"][t] - found.shared["trunk"][t]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def net_loss(params):
    x = jnp.asarray(RNG_INPUT, jnp.float32)
    hidden = jnp.tanh(x @ params["trunk"])
    outs = [hidden @ params["heads"][k] for k in ("0", "1")]
    return jnp.stack([jnp.mean(jnp.square(o - 1)) for o in outs])


RNG_INPUT = np.random.default_rng(5).normal(size=(8, 3))
NET = {
    "trunk": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "heads": {k: jnp.asarray(RNG.normal(size=4), jnp.float32) for k in ("0", "1")},
}


def test_5_flatness_is_the_slope_of_the_gradient_norms():
    """Error relative to rho falls in proportion to rho."""

    def penalty(params, t):
        g = jax.grad(lambda p: net_loss(p)[t])(params)
        own = jnp.linalg.norm(g["heads"][str(t)])
        return jnp.linalg.norm(g["trunk"].reshape(-1)) + own

    errors = []
    for rho in (0.2, 0.1, 0.05):
        found = aggregation.flat_task_grads(
            net_loss, rho_shared=rho, rho_task=rho, shared=("^trunk",)
        )(NET)
        flat = (found.shared_sam["trunk"] - found.shared["trunk"]) / rho
        want = jnp.stack([jax.grad(penalty)(NET, t)["trunk"] for t in (0, 1)])
        errors.append(float(jnp.linalg.norm((flat - want).reshape(-1))))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.4)


def test_6_a_rescaled_loss_scales_its_flatness():
    scale = jnp.array([1.0, 37.0])
    fn = aggregation.flat_task_grads(net_loss, shared=("^trunk",))
    scaled = aggregation.flat_task_grads(
        lambda p: scale * net_loss(p), shared=("^trunk",)
    )
    a, b = fn(NET), scaled(NET)
    for x, y in ((a.shared, b.shared), (a.shared_sam, b.shared_sam)):
        np.testing.assert_allclose(
            x["trunk"] * scale[:, None, None], y["trunk"], rtol=1e-4, atol=1e-5
        )


def test_7_heads_follow_their_own_task_and_are_not_aggregated():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(jax.tree.structure(updates))
        return jax.tree.map(lambda x: jnp.sum(x, 0), updates), state

    spy = aggregation.Aggregator(lambda params: (), update)
    flat = aggregation.value_and_flat_grads(net_loss, spy, shared=("^trunk",))
    _, grads, _ = flat.update(NET, flat.init(NET))
    assert seen == 2 * [
        jax.tree.structure({"trunk": 0, "heads": {"0": None, "1": None}})
    ]
    for t in (0, 1):
        g = jax.grad(lambda p, t=t: net_loss(p)[t])(NET)
        moved = {
            "trunk": NET["trunk"] + aggregation.sam_perturbation(g["trunk"], 0.05),
            "heads": jax.tree.map(
                jnp.add, NET["heads"], aggregation.sam_perturbation(g["heads"], 0.05)
            ),
        }
        want = jax.grad(lambda p, t=t: net_loss(p)[t])(moved)["heads"][str(t)]
        np.testing.assert_allclose(grads["heads"][str(t)], want, rtol=1e-4, atol=1e-6)


def test_trains_compiled_with_state_and_aux():
    flat = aggregation.value_and_flat_grads(
        lambda p, shift: (net_loss(p) + shift, {"shift": shift}),
        aggregation.pcgrad(),
        shared=("^trunk",),
        has_aux=True,
    )
    tx = optax.sgd(0.1)
    state, opt_state, params = flat.init(NET), tx.init(NET), NET
    update = jax.jit(flat.update)
    for _ in range(5):
        (losses, aux), grads, state = update(params, state, jnp.array(0.5))
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    assert float(aux["shift"]) == 0.5 and bool(state.finite)
    assert (net_loss(params) < net_loss(NET)).all()
    assert losses.shape == (2,)


def test_low_precision_leaves_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), NET)
    flat = aggregation.value_and_flat_grads(
        lambda p: net_loss(jax.tree.map(lambda x: x.astype(jnp.float32), p)),
        aggregation.mean(),
        shared=("^trunk",),
    )
    losses, grads, _ = flat.update(params, flat.init(params))
    assert losses.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_nan_is_flagged():
    flat = aggregation.flat_mtl(aggregation.sum())
    bad = {**rows(1), "b": jnp.full((3, 4), jnp.nan)}
    _, state = flat.update(rows(), flat.init(PARAMS), sam_grads=bad)
    assert not bool(state.finite)


def call(mode="individual", **options):
    flat = aggregation.flat_mtl(aggregation.sum(), mode=mode)
    return flat.update(rows(), flat.init(PARAMS), **options)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: call("both"), "mode is 'both', wanted one of direct, each"),
        (lambda: call("each"), "wants num_tasks"),
        (call, "needs `sam_grads`"),
        (lambda: call(sam_grads=rows(tasks=2)), r"'a' is \(2, 2, 3\) in sam_grads"),
        (
            lambda: aggregation.flat_task_grads(net_loss, rho_task=-1.0),
            "rho_task is -1.0",
        ),
        (
            lambda: aggregation.flat_task_grads(net_loss, shared=("body",))(NET),
            "'body' matches no leaf",
        ),
    ],
)
def test_bad_arguments(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_sharded_batch_has_one_perturbation():
    """Gradients are averaged over devices before their norm is taken."""
    mesh = train.make_mesh()
    x = jnp.asarray(RNG_INPUT, jnp.float32)
    spec = jax.sharding.PartitionSpec("data")
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["trunk"])
        outs = [hidden @ params["heads"][k] for k in ("0", "1")]
        return jnp.stack([jnp.mean(jnp.square(o - 1)) for o in outs])

    fn = jax.jit(
        aggregation.flat_task_grads(loss_fn, rho_shared=0.5, shared=("^trunk",))
    )
    close(fn(NET, split), fn(NET, x), rtol=1e-4, atol=1e-5)
