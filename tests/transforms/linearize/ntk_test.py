import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms import linearize


def model(params, x, y=None):
    h = jnp.tanh(x @ params["a"] + params["shift"][None])
    h = h if y is None else h * y
    return h @ params["b"]


def setup(seed=0, rows=4):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"a": array(3, 6), "shift": array(6), "b": array(6, 2)}
    return params, array(rows, 3), array(rows + 1, 3)


def jacobian(f, params, *inputs):
    """[N, ..., P], all leaves side by side, float64."""
    out = jax.eval_shape(f, params, *inputs)
    jac = jax.jacobian(f)(params, *inputs)
    parts = [
        np.asarray(leaf, np.float64).reshape(*out.shape, -1)
        for leaf in jax.tree.leaves(jac)
    ]
    return np.concatenate(parts, -1)


@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=8)
def test_vector_product_is_jacobian_product(seed):
    params, x1, x2 = setup(seed)
    v = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 2)), jnp.float32)
    j1, j2 = jacobian(model, params, x1), jacobian(model, params, x2)
    want = np.einsum("nap,mbp,mb->na", j1, j2, np.asarray(v, np.float64))
    got = jax.jit(linearize.ntk_vector_product, static_argnums=0)(
        model, params, x1, x2, v
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("trace_axes", [(), (-1,), (1,)])
def test_kernel_is_jacobian_product(trace_axes, batch_size):
    params, x1, x2 = setup()
    j1, j2 = jacobian(model, params, x1), jacobian(model, params, x2)
    want = np.einsum("nap,mbp->nmab", j1, j2)
    if trace_axes:
        want = np.einsum("nmaa->nm", want) / 2
    got = linearize.empirical_ntk(
        model, params, x1, x2, trace_axes=trace_axes, batch_size=batch_size
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trace_axes", "equation", "size"),
    [
        ((), "nabp,mcdp->nmabcd", 1),
        ((1,), "nabp,madp->nmbd", 3),
        ((1, 2), "nabp,mabp->nm", 6),
    ],
)
def test_matrix_outputs(trace_axes, equation, size):
    params, x, _ = setup()

    def apply_fn(p, x):
        return (x @ p["a"]).reshape(-1, 3, 2) ** 2

    jac = jacobian(apply_fn, params, x)
    want = np.einsum(equation, jac, jac) / size
    got = linearize.empirical_ntk(apply_fn, params, x, trace_axes=trace_axes)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_several_inputs_and_integer_leaves():
    params, x, _ = setup()
    y = jnp.ones((4, 6)) * jnp.arange(4.0)[:, None]
    params["order"] = jnp.array([1, 0])

    def apply_fn(p, x, y):
        return model(p, x, y)[:, p["order"]]

    floats = {k: v for k, v in params.items() if k != "order"}
    jac = jacobian(lambda p, x, y: apply_fn({**params, **p}, x, y), floats, x, y)
    got = linearize.empirical_ntk(apply_fn, params, (x, y), trace_axes=())
    np.testing.assert_allclose(
        got, np.einsum("nap,mbp->nmab", jac, jac), rtol=1e-4, atol=1e-3
    )


@pytest.mark.fast
def test_no_inputs_give_an_empty_kernel():
    params, x, _ = setup()
    assert linearize.empirical_ntk(model, params, x, x[:0]).shape == (4, 0)


@pytest.mark.fast
def test_bad_arguments_are_named():
    params, x, _ = setup()
    with pytest.raises(ValueError, match="empirical_ntk: trace axis 0"):
        linearize.empirical_ntk(model, params, x, trace_axes=(0,))
    with pytest.raises(ValueError, match="repeat an axis"):
        linearize.empirical_ntk(model, params, x, trace_axes=(1, -1))
    with pytest.raises(ValueError, match="apply_fn must map x1"):
        linearize.empirical_ntk(lambda p, x: model(p, x).mean(0), params, x)
    with pytest.raises(ValueError, match=r"ntk_vector_product: .* is \(4, 3\) in v"):
        linearize.ntk_vector_product(model, params, x, x, jnp.ones((4, 3)))
