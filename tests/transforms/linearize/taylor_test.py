import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.transforms import linearize

P = jax.sharding.PartitionSpec


def mlp(params, x):
    for layer in params["hidden"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ params["out"]


def mlp_params(seed, width=7, depth=2, inputs=5, outputs=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    sizes = [inputs] + [width] * depth

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    hidden = [
        {"w": array(a, b), "b": array(b)}
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    return {"hidden": hidden, "out": array(width, outputs)}


def like(tree, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(size * rng.normal(size=p.shape), p.dtype), tree
    )


def add(a, b, scale=1.0):
    return jax.tree.map(lambda x, y: x + x.dtype.type(scale) * y, a, b)


def inputs(seed, rows=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 5)), jnp.float32)


def oracle(params0, delta, x):
    """f + J delta in float64, with the derivative of each layer written out."""
    value = tangent = None
    x, dx = np.asarray(x, np.float64), 0.0
    for layer, step in zip(params0["hidden"], delta["hidden"], strict=True):
        w, b, dw, db = (
            np.asarray(a, np.float64)
            for a in (layer["w"], layer["b"], step["w"], step["b"])
        )
        dz = dx @ w + x @ dw + db if np.ndim(dx) else x @ dw + db
        x = np.tanh(x @ w + b)
        dx = (1 - x**2) * dz
    w, dw = np.asarray(params0["out"], np.float64), np.asarray(delta["out"], np.float64)
    value, tangent = x @ w, dx @ w + x @ dw
    return value + tangent


@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10)
def test_matches_the_expansion_written_out(seed):
    params0 = mlp_params(seed)
    delta, x = like(params0, seed + 1), inputs(seed)
    got = linearize.taylor1(mlp, params0)(add(params0, delta), x)
    np.testing.assert_allclose(got, oracle(params0, delta, x), rtol=2e-4, atol=2e-4)
    got = linearize.taylor1_delta(mlp, params0)(delta, x)
    np.testing.assert_allclose(got, oracle(params0, delta, x), rtol=2e-4, atol=2e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(4)(block()(nn.Dense(8)(x), None)[0].mean(1))


@pytest.fixture(scope="module")
def linen():
    model = Stack()
    x = jax.random.normal(jax.random.key(0), (8, 3, 5))
    params = model.init(jax.random.key(1), x)["params"]
    return (lambda p, x: model.apply({"params": p}, x)), params, x


def test_base_bit_for_bit_on_a_scanned_rematerialised_model(linen):
    apply_fn, params0, x = linen
    lin = linearize.taylor1(apply_fn, params0)
    with jax.disable_jit():  # Operation by operation, so that no fusion rounds.
        np.testing.assert_array_equal(lin(params0, x), apply_fn(params0, x))
    np.testing.assert_allclose(
        jax.jit(lin)(params0, x), jax.jit(apply_fn)(params0, x), rtol=1e-5, atol=1e-6
    )


def test_base_keeps_negative_zero_and_its_gradient():
    params0 = {"a": jnp.zeros(2)}
    lin = linearize.taylor1_delta(lambda p, x: p["a"] * x, params0)
    x = jnp.array([-1.0, 2.0])
    got = lin(params0, x)
    assert np.signbit(got).tolist() == [True, False]
    grad = jax.grad(lambda d: lin(d, x).sum())(params0)
    np.testing.assert_array_equal(grad["a"], x)


def test_gradient_at_the_base_is_the_ordinary_gradient(linen):
    apply_fn, params0, x = linen
    lin = linearize.taylor1(apply_fn, params0)

    def loss(f):
        return jax.jit(jax.grad(lambda p: jnp.square(f(p, x) - 1).mean()))(params0)

    for got, want in zip(
        jax.tree.leaves(loss(lin)), jax.tree.leaves(loss(apply_fn)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.floats(-3, 3), st.floats(-3, 3), st.integers(1, 4)
)
def test_affine_in_the_displacement(seed, a, b, depth):
    params0 = mlp_params(seed, depth=depth)
    d1, d2, x = like(params0, seed + 1), like(params0, seed + 2), inputs(seed)
    lin = linearize.taylor1_delta(mlp, params0)
    base = mlp(params0, x)
    mixed = jax.tree.map(lambda u, v: a * u + b * v, d1, d2)
    want = a * (lin(d1, x) - base) + b * (lin(d2, x) - base)
    np.testing.assert_allclose(lin(mixed, x) - base, want, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("seed", range(4))
def test_error_is_second_order(seed):
    params0 = mlp_params(seed, width=12)
    delta, x = like(params0, seed + 9), inputs(seed, 16)
    lin = linearize.taylor1(mlp, params0)

    def error(eps):
        moved = add(params0, delta, eps)
        return float(jnp.linalg.norm(mlp(moved, x) - lin(moved, x)))

    assert 3.4 < error(0.1) / error(0.05) < 4.6


def test_fine_tuning_of_an_affine_model_coincides_step_by_step():
    features = jnp.tanh(inputs(0, 32) @ like(jnp.zeros((5, 9)), 1))
    labels = jnp.arange(32) % 3

    def apply_fn(p, x):
        return x @ p["w"] + p["b"][None]

    params0 = {"w": like(jnp.zeros((9, 3)), 2), "b": jnp.zeros(3)}
    tx = optax.adamw(1e-2, weight_decay=0.1)

    def trace(f):
        def loss(p):
            out = optax.softmax_cross_entropy_with_integer_labels(
                f(p, features), labels
            )
            return out.mean()

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state, seen = params0, tx.init(params0), []
        for _ in range(15):
            with jax.numpy_dtype_promotion("standard"):  # optax mixes kinds
                params, state = step(params, state)
            seen.append(np.concatenate([np.ravel(v) for v in jax.tree.leaves(params)]))
        return np.stack(seen)

    got, want = trace(linearize.taylor1(apply_fn, params0)), trace(apply_fn)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want[-1] - want[0]).max() > 0.05


def test_no_gradient_reaches_the_base_but_inputs_get_theirs():
    params0 = mlp_params(0)
    params, x = add(params0, like(params0, 1)), inputs(0)

    def loss(base, params, x):
        return linearize.taylor1(mlp, base)(params, x).sum()

    base, moved, inp = jax.grad(loss, (0, 1, 2))(params0, params, x)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(base))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(moved))
    assert (inp != 0).any()


def test_other_leaves_and_outputs_pass_through():
    params0 = {
        "w": jnp.ones(3),
        "table": jnp.array([2, 0, 1]),
        "key": jax.random.key(7),
    }

    def apply_fn(p, x):
        noise = jax.random.normal(p["key"], x.shape)
        y = (p["w"] * x + noise)[p["table"]]
        return {"y": y, "argmax": jnp.argmax(y)}, p["table"].sum()

    x = jnp.arange(3.0)
    lin = linearize.taylor1(apply_fn, params0, has_aux=True)
    moved = {**params0, "w": jnp.array([2.0, 3.0, 4.0]), "table": jnp.array([0, 0, 0])}
    out, aux = lin(moved, x)
    want, _ = apply_fn({**params0, "w": moved["w"]}, x)
    np.testing.assert_allclose(out["y"], want["y"], rtol=1e-6)
    assert out["argmax"] == apply_fn(params0, x)[0]["argmax"]
    assert aux == 3 and out["argmax"].dtype == jnp.int32


def test_bfloat16_outputs_keep_their_dtype_and_bits():
    params0 = mlp_params(3, dtype=jnp.bfloat16)
    x = inputs(3).astype(jnp.bfloat16)
    lin = linearize.taylor1(mlp, params0)
    np.testing.assert_array_equal(lin(params0, x), mlp(params0, x))
    assert lin(add(params0, params0), x).dtype == jnp.bfloat16
    wide = jax.tree.map(lambda p: p.astype(jnp.float32) * 1.01, params0)
    assert lin(wide, x).dtype == jnp.bfloat16


def test_vmap_over_parameters_is_a_loop():
    params0 = mlp_params(0)
    taus = jax.tree.map(lambda *a: jnp.stack(a), *[like(params0, s) for s in range(3)])
    x = inputs(0)
    lin = linearize.taylor1_delta(mlp, params0)
    got = jax.vmap(lin, (0, None))(taus, x)
    want = [lin(jax.tree.map(lambda t, i=i: t[i], taus), x) for i in range(3)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_task_outputs(linen, batch_size):
    apply_fn, params0, x = linen
    taus = [like(params0, s, 0.1) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *taus)
    apply = linearize.task_outputs(apply_fn, params0, stacked, batch_size=batch_size)
    got = jax.jit(apply)(x)
    lin = linearize.taylor1_delta(apply_fn, params0)
    want = jnp.stack([lin(tau, x) for tau in taus])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def dots(jaxpr):
    """Multiply-adds of all matrix products, loops counted in full."""
    total = 0
    for eqn in jaxpr.eqns:
        repeat = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * np.prod([shape[i] for i in contract])
        for value in eqn.params.values():
            sub = getattr(value, "jaxpr", value)
            total += repeat * dots(sub) if hasattr(sub, "eqns") else 0
    return total


def test_task_outputs_share_the_base_pass():
    params0 = mlp_params(0)
    stacked = jax.tree.map(
        lambda *a: jnp.stack(a), *[like(params0, s) for s in range(4)]
    )
    one = jax.tree.map(lambda t: t[0], stacked)
    x = inputs(0)
    apply = linearize.task_outputs(mlp, params0, stacked)
    base = dots(jax.make_jaxpr(mlp)(params0, x).jaxpr)
    single = dots(jax.make_jaxpr(linearize.taylor1_delta(mlp, params0))(one, x).jaxpr)
    shared = dots(jax.make_jaxpr(apply)(x).jaxpr)
    assert shared == base + 4 * (single - base)


def test_scale_sweep_is_one_jvp(linen):
    apply_fn, params0, x = linen
    delta = like(params0, 5, 0.2)
    scales = np.linspace(-1, 2, 7)
    sweep = linearize.scale_sweep(apply_fn, params0, delta, scales)
    lin = linearize.taylor1_delta(apply_fn, params0)
    want = [lin(jax.tree.map(lambda d, s=s: float(s) * d, delta), x) for s in scales]
    np.testing.assert_allclose(jax.jit(sweep)(x), jnp.stack(want), rtol=1e-4, atol=1e-5)
    mlp0, y = mlp_params(0), inputs(0)
    zero = linearize.scale_sweep(mlp, mlp0, like(mlp0, 1), [0.0])(y)[0]
    np.testing.assert_array_equal(zero, mlp(mlp0, y))


def test_sharded_equals_unsharded(linen):
    apply_fn, params0, x = linen
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def place(leaf):
        split = leaf.ndim and leaf.shape[-1] % 4 == 0
        spec = P(*[None] * (leaf.ndim - 1), "model") if split else P()
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    params = add(params0, like(params0, 3, 0.1))
    base, moved = jax.tree.map(place, (params0, params))
    rows = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
    got = jax.jit(lambda b, p, x: linearize.taylor1(apply_fn, b)(p, x))(
        base, moved, rows
    )
    want = linearize.taylor1(apply_fn, params0)(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "out": p["out"][:2]}, r"taylor1: 'out' is \(2, 3\)"),
        (lambda p: {"hidden": p["hidden"]}, r"taylor1: 'out' is in params0"),
        (lambda p: {**p, "out": jnp.zeros((7, 3), int)}, r"taylor1: 'out' is integer"),
    ],
)
def test_mismatched_parameters_are_named(change, message):
    params0 = mlp_params(0)
    lin = linearize.taylor1(mlp, params0)
    with pytest.raises(ValueError, match=message):
        lin(change(params0), inputs(0))


def test_bad_sweep_and_stack():
    params0 = mlp_params(0)
    with pytest.raises(ValueError, match=r"scale_sweep: scales must be \[A\]"):
        linearize.scale_sweep(mlp, params0, params0, 1.0)
    with pytest.raises(ValueError, match="task_outputs: "):
        linearize.task_outputs(mlp, params0, params0)
