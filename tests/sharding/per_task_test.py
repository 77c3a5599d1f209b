"""Task gradients, Gramians and combined gradients do not depend on the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import aggregation, bilevel, train, tree
from mtl_jax.train.hlo import collectives

T, D, H = 3, 16, 24
RULES = (
    ("trunk/in$", P("data", "model")),
    ("trunk/blocks$", P(None, "model", "data")),
    (".*", P()),
)


def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
        "trunk": {
            "in": 0.3 * jax.random.normal(first, (D, H)),
            "blocks": 0.3 * jax.random.normal(second, (2, H, H)),
        },
        "heads": 0.3 * jax.random.normal(third, (H, T)),
    }


def encode(params, batch, key):
    del key

    @jax.checkpoint
    def block(h, w):
        return h + jnp.tanh(h @ w), None

    h = jnp.tanh(batch["x"] @ params["trunk"]["in"])
    return jax.lax.scan(block, h, params["trunk"]["blocks"])[0]


def heads(params, copies, batch, key):
    del key
    found = jnp.einsum("tbd,dt->bt", copies, params["heads"])
    return jnp.mean((found - batch["y"]) ** 2, 0), {}


ENGINES = {
    "map": {},
    "vmap": {"chunk": 2},
    "gramian": {},
    "features": {"shared": (".*",)},
    "flat": {
        "radii": (0.1, 0.1),
        "aggregator": aggregation.flat_mtl(aggregation.pcgrad(seed=1)),
    },
    "bilevel": {
        "shared": (".*",),
        "aggregator": bilevel.as_aggregator(bilevel.auto_lambda, T, inner_rate=0.1),
    },
}
LOSS = aggregation.SplitLoss(encode=encode, heads=heads, num_tasks=T)


def batch(step):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(32, D)).astype(np.float32),
        "y": rng.normal(size=(32, T)).astype(np.float32),
    }


def trainer(mesh, **changes):
    options = {
        "init": init,
        "loss_fn": LOSS,
        "tx": optax.sgd(0.05),
        "rules": RULES,
        "aggregator": aggregation.pcgrad(seed=1),
        "shared": ("trunk",),
    }
    accumulate = changes.pop("accumulate", 1)
    trainable = train.Trainable(**(options | changes))
    return train.Trainer(trainable, mesh=mesh, accumulate=accumulate)


def single(**changes):
    return trainer(train.make_mesh(devices=jax.devices()[:1]), **changes)


def close(a, b, **tolerance):
    tolerance = {"rtol": 2e-4, "atol": 2e-6} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def text_of(many):
    placed = train.shard_batch(many.mesh, batch(0))
    lowered = many.compiled_step.lower(many.abstract_state, placed)
    return lowered.compile().as_text()


@pytest.mark.parametrize("engine", [*ENGINES, "every second"])
def test_eight_devices_equal_one(engine):
    changes = {"grads": engine} | ENGINES.get(engine, {})
    if engine == "every second":
        every = aggregation.every_k(aggregation.pcgrad(seed=1), T, 2)
        changes = {"aggregator": every}
    one = single(**changes).fit(batch, steps=3, log_every=1)
    many = trainer(train.make_mesh(4, 2), **changes).fit(batch, steps=3, log_every=1)
    close(one.params, many.params)
    for first, second in zip(one.history, many.history, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("engine", ["map", "gramian"])
def test_microbatches_on_a_mesh(engine):
    one = single(grads=engine).fit(batch, steps=2)
    many = trainer(train.make_mesh(2, 4), grads=engine, accumulate=2)
    close(one.params, many.fit(batch, steps=2).params)


@pytest.mark.parametrize("engine", ["map", "vmap"])
def test_rows_of_sharded_parameters_are_sharded(engine):
    text = text_of(trainer(train.make_mesh(4, 2), grads=engine))
    assert f"f32[{T},{D // 4},{H // 2}]" in text
    assert f"f32[{T},2,{H // 2},{H // 4}]" in text
    assert f"f32[{T},{D},{H}]" not in text
    assert f"f32[{T},2,{H},{H}]" not in text
    sent = {c.shape for c in collectives(text) if c.kind == "all-gather"}
    # Cotangents [T, 8, H] of activations may be; rows may not.
    assert not any(shape[:2] in {(T, D), (T, D // 4), (T, 2)} for shape in sent)


def test_the_gramian_engine_holds_no_rows_and_no_whole_stack():
    text = text_of(trainer(train.make_mesh(4, 2), grads="gramian"))
    for shape in (f"{D // 4},{H // 2}", f"2,{H // 2},{H // 4}", f"2,{H},{H}"):
        assert f"f32[{T},{shape}]" not in text


def test_state_that_is_shaped_like_the_rows_is_split_like_the_parameters():
    def keeping():
        return aggregation.from_gradients(
            "keeping",
            lambda params: jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), params),
            lambda grads, state, **extra: (tree.combine(grads, jnp.ones(T)), grads),
        )

    many = trainer(train.make_mesh(4, 2), aggregator=keeping())
    state, _ = many.step(many.init_state(), batch(0))
    kept = state.opt_state.aggregator.method["trunk"]
    assert kept["in"].sharding.spec == P(None, "data", "model")
    assert kept["blocks"].addressable_shards[0].data.shape == (T, 2, H // 2, H // 4)


@pytest.mark.parametrize("engine", ["map", "gramian"])
def test_gramian_under_jit_equals_one_device(engine):
    mesh = train.make_mesh(4, 2)
    params = init(jax.random.key(0))
    specs = train.specs_from_rules(params, RULES)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
    )

    def losses(params, rows):
        return LOSS(params, rows, None)[0]

    def fn(params, rows):
        found = aggregation.value_and_gramian(losses, engine=engine)
        values, gram, pullback = found(params, rows)
        return values, gram, pullback(1 / jnp.diag(gram))

    want = jax.jit(fn)(params, batch(0))
    close(jax.jit(fn)(placed, train.shard_batch(mesh, batch(0))), want)


def test_the_cast_that_a_gradient_inside_shard_map_needs():
    """Without it the transpose adds over the axis, and the mean is 8 times too long."""
    mesh = train.make_mesh()
    x = jnp.arange(8.0)

    def right(p, x):
        fn = aggregation.value_and_scattered_grads(
            lambda p, x: (p * x).mean()[None], "data"
        )
        return fn(p, x)[1]

    def wrong(p, x):
        return jax.lax.pmean(jax.grad(lambda p: (p * x).mean())(p), "data")

    def run(fn, out_specs):
        mapped = jax.shard_map(
            fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=out_specs
        )
        return jax.jit(mapped)(jnp.ones(()), x)

    slices = run(right, P(None, "data"))
    assert aggregation.unscatter(slices, jnp.ones(())).tolist() == [x.mean()]
    assert float(run(wrong, P())) == 8 * x.mean()


def test_methods_that_need_rows_inside_shard_map():
    """The largest entry of all tasks, coordinate by coordinate, on slices."""
    mesh = train.make_mesh()
    params = init(jax.random.key(0))

    def losses(params, rows):
        return LOSS(params, rows, None)[0]

    def body(params, rows):
        fn = aggregation.value_and_scattered_grads(losses, "data")
        return jax.tree.map(lambda g: g.max(0), fn(params, rows)[1])

    flat = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    )(params, batch(0))
    rows = aggregation.value_and_task_grads(losses)(params, batch(0))[1]
    want = jax.tree.map(lambda g: g.max(0), rows)
    close(aggregation.unscatter(flat, params), want)
