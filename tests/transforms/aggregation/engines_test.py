import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import aggregation, tree

T = 3
X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, T)).astype(np.float32)


def init(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "inner": {"w": jax.random.normal(keys[0], (5, 8)), "b": jnp.zeros(8)},
        "blocks": 0.3 * jax.random.normal(keys[1], (2, 8, 8)),
        "heads": jax.random.normal(keys[2], (8, T)),
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


def make_losses(act=jnp.tanh, remat=False):
    def losses(params, x, y):
        hidden = act(x @ params["inner"]["w"] + params["inner"]["b"][None])

        def block(h, w):
            return h + act(h @ w), None

        body = jax.checkpoint(block) if remat else block
        hidden = jax.lax.scan(body, hidden, params["blocks"])[0]
        return jnp.mean((hidden @ params["heads"] - y) ** 2, axis=0)

    return losses


def forward_jacobian(losses, params, *args):
    """Forward mode, one column at a time: shares nothing with the engines."""
    return jax.jacfwd(losses)(params, *args)


def close(a, b, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-6} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def with_backward(backward):
    """The identity, with a backward rule of its own."""

    @jax.custom_vjp
    def op(x):
        return x

    op.defvjp(lambda x: (x, None), lambda _, g: (backward(g),))
    return lambda x: jnp.tanh(op(x))


def host_call(g):
    shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
    return jax.pure_callback(np.asarray, shape, g, vmap_method="sequential")


def unknown_length(g):
    return jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 1.0), (0, g)
    )[1]


@pytest.mark.parametrize("engine", ["auto", "map", "vmap"])
@pytest.mark.parametrize("remat", [False, True])
def test_task_gradients_are_the_jacobian(engine, remat):
    losses = make_losses(remat=remat)
    fn = jax.jit(aggregation.value_and_task_grads(losses, engine=engine))
    values, grads = fn(init(), X, Y)
    close(values, losses(init(), X, Y))
    close(grads, forward_jacobian(losses, init(), X, Y))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_rows_come_some_at_a_time(chunk):
    losses = make_losses()
    fn = aggregation.value_and_task_grads(losses, engine="vmap", chunk=chunk)
    grads = jax.jit(fn)(init(), X, Y)[1]
    close(grads, forward_jacobian(losses, init(), X, Y))


@pytest.mark.parametrize(("engine", "chunk"), [("map", 2), ("vmap", 0)])
def test_chunks_that_cannot_be(engine, chunk):
    with pytest.raises(ValueError, match=f"chunk is {chunk} with engine '{engine}'"):
        aggregation.value_and_task_grads(make_losses(), engine=engine, chunk=chunk)


@pytest.mark.parametrize("engine", ["auto", "gramian", "map", "vmap"])
@pytest.mark.parametrize("remat", [False, True])
def test_gramian_and_pullback_equal_the_jacobian(engine, remat):
    losses = make_losses(remat=remat)
    weights = jnp.array([0.5, -2.0, 1.0])

    def fn(params):
        gramian = aggregation.value_and_gramian(losses, engine=engine)
        values, gram, pullback = gramian(params, X, Y)
        return values, gram, pullback(weights)

    values, gram, grad = jax.jit(fn)(init())
    jacobian = forward_jacobian(losses, init(), X, Y)
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(T, -1) for x in jax.tree.leaves(jacobian)], 1
    )
    close(values, losses(init(), X, Y))
    close(gram, flat @ flat.T, rtol=1e-4)
    np.testing.assert_array_equal(gram, gram.T)
    close(grad, tree.combine(jacobian, weights))
    assert gram.dtype == jnp.float32


@pytest.mark.parametrize("engine", ["gramian", "map", "vmap"])
def test_combined_gradient_is_what_the_aggregator_makes(engine):
    losses = make_losses()

    def weights_fn(gram):
        return aggregation.weights.pcgrad(gram, jax.random.key(3))

    fn = aggregation.value_and_combined_grad(losses, weights_fn, engine=engine)
    _, grad = jax.jit(fn)(init(), X, Y)
    jacobian = forward_jacobian(losses, init(), X, Y)
    close(grad, tree.combine(jacobian, weights_fn(tree.gram(jacobian))))


def test_the_gramian_engine_forms_no_task_gradients():
    wide = {"w": jnp.ones((64, 512)), "heads": jnp.ones((512, 40))}

    def losses(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) @ params["heads"], 0)

    def temporaries(engine):
        fn = aggregation.value_and_combined_grad(
            losses, lambda g: 1 / jnp.diag(g), engine=engine
        )
        compiled = jax.jit(fn).lower(wide, jnp.ones((4, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    jacobian = 40 * tree.nbytes(wide)
    assert temporaries("map") >= jacobian > 8 * temporaries("gramian")


def test_aux_comes_back():
    def losses(params, x, y):
        return make_losses()(params, x, y), {"mean": jnp.mean(x)}

    for fn in (
        aggregation.value_and_task_grads(losses, has_aux=True),
        aggregation.value_and_gramian(losses, has_aux=True),
        aggregation.value_and_combined_grad(losses, jnp.diag, has_aux=True),
    ):
        (values, aux), *_ = fn(init(), X, Y)
        assert values.shape == (T,)
        np.testing.assert_allclose(aux["mean"], X.mean(), rtol=1e-6)


@pytest.mark.parametrize("backward", [host_call, unknown_length])
def test_auto_falls_back_where_the_backward_pass_has_no_transpose(backward):
    losses = make_losses(with_backward(backward))
    auto = jax.jit(lambda p: aggregation.value_and_gramian(losses)(p, X, Y)[:2])
    _, gram = auto(init())
    _, rows = aggregation.value_and_task_grads(make_losses())(init(), X, Y)
    close(gram, tree.gram(rows), rtol=1e-4)
    with pytest.raises(ValueError, match='cannot be transposed.*use engine="map"'):
        aggregation.value_and_gramian(losses, engine="gramian")(init(), X, Y)


def test_a_backward_rule_that_is_not_linear_is_not_transposed():
    """A transpose of its derivative at zero would give another Gramian, silently."""
    losses = make_losses(with_backward(lambda g: jnp.clip(g, -1e-3, 1e-3)))
    _, gram, _ = aggregation.value_and_gramian(losses)(init(), X, Y)
    _, rows = aggregation.value_and_task_grads(losses)(init(), X, Y)
    close(gram, tree.gram(rows))


def test_a_plain_custom_rule_is_transposed():
    losses = make_losses(with_backward(lambda g: 3 * g))
    _, gram, _ = aggregation.value_and_gramian(losses, engine="gramian")(init(), X, Y)
    _, rows = aggregation.value_and_task_grads(losses)(init(), X, Y)
    close(gram, tree.gram(rows), rtol=1e-4)


def test_errors_of_the_model_are_not_swallowed():
    def backward(g):
        raise RuntimeError("the model's own")

    losses = make_losses(with_backward(backward))
    with pytest.raises(RuntimeError, match="the model's own"):
        aggregation.value_and_gramian(losses)(init(), X, Y)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_leaves_keep_their_dtype_and_weights_their_precision(dtype):
    params = {"w": jnp.ones(4, dtype)}

    def losses(params, x):
        return (x * params["w"][None]).sum(1)

    x = jnp.eye(4)[:2].astype(dtype)
    values, grads = aggregation.value_and_task_grads(losses)(params, x)
    assert values.dtype == jnp.float32 and grads["w"].dtype == dtype
    _, gram, pullback = aggregation.value_and_gramian(losses)(params, x)
    assert gram.dtype == jnp.float32
    assert pullback(jnp.array([1.0, 2.0]))["w"].dtype == dtype


def test_one_task_is_the_ordinary_gradient():
    def losses(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]), keepdims=True).reshape(1)

    params = {"w": jnp.ones((5, 2))}
    wanted = jax.grad(lambda p: losses(p, X)[0])(params)
    _, gram, pullback = aggregation.value_and_gramian(losses)(params, X)
    close(pullback(jnp.ones(1)), wanted)
    close(gram, [[jnp.sum(wanted["w"] ** 2)]])


def test_batches_of_models_under_vmap():
    losses = make_losses()
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), init())
    fn = aggregation.value_and_gramian(losses, engine="gramian")
    _, gram = jax.vmap(lambda p: fn(p, X, Y)[:2])(many)
    _, second = fn(jax.tree.map(lambda x: 0.5 * x, init()), X, Y)[:2]
    close(gram[1], second, rtol=1e-4)


@pytest.mark.parametrize("engine", ["gramian", "map"])
def test_a_nan_task_shows_in_losses_and_gramian(engine):
    def losses(params):
        return jnp.stack([jnp.sum(params["w"] ** 2), jnp.sqrt(-params["w"][0])])

    fn = aggregation.value_and_gramian(losses, engine=engine)
    values, gram, _ = fn({"w": jnp.ones(2)})
    assert np.isnan(values).tolist() == [False, True]
    assert np.isnan(gram[1, 1])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda p: p["w"].sum(), r"are \(\), wanted \[T\]"),
        (lambda p: p["w"][None], r"are \(1, 2\), wanted \[T\]"),
        (lambda p: p["w"][:0], r"are \(0,\), wanted \[T\]"),
        (lambda p: [p["w"][0]], r"are list, wanted \[T\]"),
        (lambda p: jnp.arange(2), "are int32, wanted floating"),
    ],
)
def test_bad_losses(losses, message):
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="value_and_task_grads: .* loss_fn " + message):
        aggregation.value_and_task_grads(losses)(params)
    with pytest.raises(ValueError, match="value_and_gramian: .* loss_fn " + message):
        aggregation.value_and_gramian(losses)(params)


def test_bad_arguments():
    with pytest.raises(ValueError, match="engine is 'gram', wanted one of auto, map"):
        aggregation.value_and_task_grads(make_losses(), engine="gram")
    with pytest.raises(ValueError, match="wants to return .losses .T., aux., found"):
        aggregation.value_and_task_grads(make_losses(), has_aux=True)(init(), X, Y)
    with pytest.raises(ValueError, match="'n' is int32, gradients want floating"):
        aggregation.value_and_task_grads(lambda p: p["w"])(
            {"n": jnp.arange(2), "w": jnp.ones(2)}
        )


@pytest.mark.parametrize("engine", ["map", "vmap"])
def test_scattered_slices_are_the_jacobian_of_the_whole_batch(engine):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    losses = make_losses()
    fn = aggregation.value_and_scattered_grads(losses, "data", engine=engine)

    def body(params, x, y):
        values, slices = fn(params, x, y)
        gram = jax.lax.psum(tree.gram(slices), "data")
        return values, slices, gram

    values, slices, gram = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P(), P(None, "data"), P()),
        )
    )(init(), X, Y)
    wanted_values, wanted = aggregation.value_and_task_grads(losses)(init(), X, Y)
    close(values, wanted_values)
    close(aggregation.unscatter(slices, init()), wanted)
    close(gram, tree.gram(wanted), rtol=1e-4)
    for leaf in jax.tree.leaves(slices):
        assert leaf.addressable_shards[0].data.shape == (T, leaf.shape[1] // 8)


def test_rows_at_once_where_parameters_are_sharded():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split, spread = (NamedSharding(mesh, P(*a, "model")) for a in ([], [None]))
    params = jax.device_put({"w": np.ones((16, 3), np.float32)}, split)
    x = jnp.arange(16.0) / 16

    def losses(p):
        return jnp.tanh(x @ p["w"])

    fn = aggregation.value_and_task_grads(losses, engine="vmap")
    step = jax.jit(lambda p: fn(p)[1], out_shardings={"w": spread})
    close(step(params), aggregation.value_and_task_grads(losses)(params)[1])
    assert "all-gather" not in step.lower(params).compile().as_text()


def test_rows_at_once_on_one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    fn = aggregation.value_and_task_grads(make_losses(), engine="vmap")
    step = jax.jit(lambda p: fn(p, X, Y)[1])
    assert "LayoutConstraint" in step.lower(init()).as_text()
    wanted = aggregation.value_and_task_grads(make_losses())(init(), X, Y)[1]
    close(step(init()), wanted)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), init())
    first = jax.tree.map(lambda x: x[0], jax.vmap(step)(many))
    close(first, wanted, rtol=1e-5)
    jax.jvp(step, (init(),), (init(),))
