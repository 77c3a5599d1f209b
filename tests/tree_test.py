"""Path strings, checks and arithmetic over trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import tree


@pytest.fixture
def params():
    return {
        "block": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)},
        "step": jnp.int32(7),
    }


@pytest.mark.fast
def test_paths_and_select(params):
    assert tree.paths(params) == ["block/bias", "block/kernel", "step"]
    picked = tree.select(params, "kernel$", "^step$")
    assert picked == {"block": {"kernel": True, "bias": False}, "step": True}


@pytest.mark.fast
def test_select_refuses_what_is_no_regular_expression(params):
    with pytest.raises(ValueError, match=r"select: '\(' is no regular expression"):
        tree.select(params, "(")


def test_select_refuses_a_pattern_that_matches_nothing(params):
    with pytest.raises(ValueError, match=r"select: 'head' matches no leaf.*block/bias"):
        tree.select(params, "head")


@pytest.mark.fast
def test_nnx_value_suffix_is_stripped_and_a_dict_key_is_not():
    nnx = pytest.importorskip("flax.nnx")
    _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert tree.paths(state) == ["bias", "kernel"]
    assert tree.paths({"a": {"value": 1}}) == ["a/value"]


@pytest.mark.fast
def test_stack_and_unstack_are_inverse(params):
    twice = tree.stack([params, jax.tree.map(lambda x: x + x.dtype.type(1), params)])
    assert tree.num_tasks("f", twice) == 2
    back = tree.unstack(twice)
    jax.tree.map(np.testing.assert_array_equal, back[0], params)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"step": jnp.float32(7)},
            "'step' is floating in other, integer",
        ),
        (lambda p: p | {"extra": jnp.ones(1)}, "'extra' is in other but not in base"),
        (lambda p: {"step": p["step"]}, "'block/bias' is in base but not in other"),
        (lambda p: p | {"step": "7"}, "'step' in other is a str, not an array"),
        (lambda p: p | {"step": jnp.zeros(2, int)}, r"'step' is \(2,\) in other, \(\)"),
    ],
)
def test_check_match_names_the_leaf(params, change, message):
    with pytest.raises(ValueError, match=f"f: {message}"):
        tree.check_match("f", params, change(params))


@pytest.mark.fast
def test_check_match_allows_another_width_and_refuses_another_container():
    base = {"w": jnp.ones(2), "v": jnp.ones(1)}
    tree.check_match("f", base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    with pytest.raises(ValueError, match="in other containers"):
        tree.check_match("f", [jnp.ones(2)], (jnp.ones(2),))


@pytest.mark.fast
def test_check_finite_names_the_leaf_and_ignores_tracers(params):
    tree.check_finite("f", params)
    bad = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan]), "c": jnp.array(jnp.inf)}
    with pytest.raises(ValueError, match=r"f: 'b' holds NaN or infinity \(and 1 more"):
        tree.check_finite("f", bad)
    jax.jit(lambda t: tree.check_finite("f", t))(bad)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "has no leaves"),
        ({"a": jnp.float32(1)}, "'a' is a scalar"),
        ({"a": jnp.ones((2, 1)), "b": jnp.ones(3)}, "'b' has 3 tasks, 'a' has 2"),
        ({"a": jnp.ones((0, 1))}, "'a' has no tasks"),
    ],
)
def test_num_tasks_refuses(bad, message):
    with pytest.raises(ValueError, match=f"f: .*{message}"):
        tree.num_tasks("f", bad)


@pytest.mark.fast
def test_add_scaled_rounds_once_and_leaves_integers_alone(params):
    delta = jax.tree.map(jnp.ones_like, params)
    moved = tree.add_scaled(params, delta, 0.5)
    assert jax.tree.map(lambda x: x.dtype, moved) == jax.tree.map(
        lambda x: x.dtype, params
    )
    assert moved["step"] == 7
    np.testing.assert_array_equal(moved["block"]["kernel"], jnp.full((2, 3), 1.5))
    # Just above half a bfloat16 step: rounded to bfloat16 first, it is a tie and lost.
    base, step = jnp.ones(1, jnp.bfloat16), jnp.full(1, 1.001 * 2**-8)
    assert tree.add_scaled(base, step, 1.0)[0] == 1 + 2**-7


@pytest.mark.fast
def test_add_scaled_takes_one_scale_per_leaf():
    base = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    delta = jax.tree.map(jnp.ones_like, base)
    moved = tree.add_scaled(base, delta, {"a": 2.0, "b": jnp.float32(3.0)})
    assert moved["a"].tolist() == [2.0, 2.0] and moved["b"].tolist() == [3.0]
    with pytest.raises(ValueError, match="neither a scalar nor a tree"):
        tree.add_scaled(base, delta, {"a": 2.0})
    with pytest.raises(ValueError, match="scale of 'a' is nan, wanted a number"):
        tree.add_scaled({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, float("nan"))
    with pytest.raises(ValueError, match=r"scale of 'a' is \(2,\)"):
        tree.add_scaled(base, delta, jnp.ones(2))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 32, 33, 63, 100])
def test_combine_is_the_weighted_sum(dtype, count):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(count, 4, 5)), rng.normal(size=count)
    x = jnp.asarray(x, dtype)
    want = np.tensordot(w, np.asarray(x, np.float64), 1)
    got = tree.combine({"x": x}, jnp.asarray(w, jnp.float32))["x"]
    assert got.dtype == dtype
    tol = 1e-6 * count if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tol, atol=tol)
    per_leaf = tree.combine({"x": x}, {"x": jnp.asarray(w, jnp.float32)})["x"]
    np.testing.assert_array_equal(per_leaf, got)
    with pytest.raises(ValueError, match=rf"weights are \(2,\), wanted \({count},\)"):
        tree.combine({"x": x}, jnp.ones(2))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("count", [2, 33])
def test_combine_has_both_slopes(dtype, count):
    """Forward, backward and mapped; slices of integers would have none."""
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(count, 6)), dtype) for _ in range(2))
    w, dw = (jnp.asarray(rng.normal(size=count), jnp.float32) for _ in range(2))
    wide = [np.asarray(y, np.float64) for y in (x, w, dx, dw)]
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype != jnp.float32 else {"rtol": 1e-4}

    def f(x, w):
        return tree.combine({"w": x}, w)["w"].astype(jnp.float32)

    _, slope = jax.jvp(f, (x, w), (dx, dw))
    np.testing.assert_allclose(
        slope, wide[1] @ wide[2] + wide[3] @ wide[0], **tolerance
    )
    to_x, to_w = jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))(x, w)
    assert to_x.dtype == dtype
    want = np.broadcast_to(wide[1][:, None], x.shape)
    np.testing.assert_allclose(np.asarray(to_x, np.float64), want, **tolerance)
    np.testing.assert_allclose(to_w, wide[0].sum(1), **tolerance)
    many = jax.vmap(f, (None, 0))(x, jnp.stack([w, dw]))
    np.testing.assert_allclose(many[1], wide[3] @ wide[0], **tolerance)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (jnp.bfloat16, "float32"),
        (np.dtype("float16"), "float32"),
        (jnp.float8_e4m3fn, "float32"),
        (jnp.float32, "float32"),
        ("float64", "float64"),
        (jnp.complex64, "complex64"),
        (jnp.int8, "int8"),
    ],
)
def test_sums_are_formed_in_float32_or_wider(dtype, want):
    assert tree.wide_dtype(dtype) == want


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [3, 20])
def test_gram_matches_float64_blocked_or_not(count, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    taus = {
        "w": jnp.asarray(rng.normal(size=(count, 250, 170)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(count, 5)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=(count, 40001)), jnp.bfloat16),
        "f": jnp.asarray(rng.normal(size=(count, 20, 2001)), jnp.float16),
        "n": jnp.ones((count, 4), jnp.int32),
        "e": jnp.zeros((count, 0)),
    }
    flat = np.concatenate(
        [np.asarray(taus[k], np.float64).reshape(count, -1) for k in "whbf"], axis=1
    )
    # Off the diagonal, products of some 120,000 elements cancel.
    np.testing.assert_allclose(tree.gram(taus), flat @ flat.T, rtol=1e-5, atol=1e-1)
    other = jax.tree.map(lambda x: x[::-1], taus)
    found = tree.gram(taus, other)
    np.testing.assert_allclose(found, flat @ flat[::-1].T, rtol=1e-5, atol=1e-1)
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("devices", [1, 8])
def test_gram_has_a_slope_blocked_or_not(devices, dtype, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 20001)), dtype)
    cotangent = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    _, pull = jax.vjp(lambda x: tree.gram({"w": x}), x)
    (found,) = pull(cotangent)
    both = np.asarray(cotangent + cotangent.T, np.float64)
    assert found.dtype == dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        both @ np.asarray(x, np.float64),
        rtol=0,
        atol=10 * tolerance,
    )
    jax.clear_caches()


@pytest.mark.fast
def test_sizes():
    sample = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(())}
    assert tree.size(sample) == 7
    assert tree.nbytes(sample) == 16
