import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtl_jax import train

pytestmark = pytest.mark.fast

B, D, H, L = 4, 8, 16, 3
X = jax.ShapeDtypeStruct((B, D), jnp.float32)
W = jax.ShapeDtypeStruct((D, D), jnp.float32)
ONE = 2 * B * D * D  # One [B, D] x [D, D] product.


def count(fn, *args):
    return train.count_flops(fn, *args).total


def test_scan_multiplies_by_its_length():
    def fn(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    assert count(fn, X, W) == 7 * ONE


def test_gradient_of_scan_with_and_without_remat():
    stack = jax.ShapeDtypeStruct((L, 2, D, D), jnp.float32)

    def loss(stack, x, wrap):
        def block(c, w):
            return jnp.tanh(jnp.tanh(c @ w[0]) @ w[1]), None

        return jax.lax.scan(wrap(block), x, stack)[0].sum()

    def grad(wrap):
        return count(jax.grad(lambda s, x: loss(s, x, wrap)), stack, X)

    # Forward 2 products a block, backward 4; the block's output is a tanh, so remat
    # needs both products again.
    assert grad(lambda f: f) == L * 6 * ONE
    assert grad(jax.checkpoint) == L * 8 * ONE


def test_conditionals_count_their_dearest_branch():
    def fn(x, w, n):
        return jax.lax.switch(n, [lambda: x, lambda: x @ w, lambda: x @ w @ w])

    assert count(fn, X, W, jnp.int32(0)) == 2 * ONE


def test_unknown_loops_are_counted_once_and_declared():
    def fn(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)

    assert train.count_flops(fn, X, W) == train.Flops(ONE, 1)


def test_custom_rules_and_nested_jit():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    @jax.custom_jvp
    def softer(x):
        return jax.jit(lambda y: y @ y.T)(x)

    softer.defjvp(lambda p, t: (softer(p[0]), 2 * p[0] @ t[0].T))
    assert count(product, X, W) == ONE
    assert count(jax.grad(lambda w, x: product(x, w).sum()), W, X) == 3 * ONE
    assert count(jax.jit(softer), X) == 2 * B * B * D


def test_batched_and_multi_dimensional_products():
    q = jax.ShapeDtypeStruct((2, 5, 3, 4), jnp.float32)
    assert count(lambda q: jnp.einsum("bqhd,bkhd->bhqk", q, q), q) == 2 * 2 * 3 * 25 * 4


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, 4 // groups, 6), jnp.float32)

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    one = 2 * (2 * 8 * 8 * 6) * 9 * (4 // groups)
    assert count(conv, x, w) == one


def test_ragged_products_cost_one_group_a_row_forward_and_backward():
    rhs = jax.ShapeDtypeStruct((5, D, H), jnp.float32)
    sizes = np.array([1, 0, 3, 0, 0], np.int32)

    def loss(x, w):
        return jax.lax.ragged_dot(x, w, sizes).sum()

    assert count(loss, X, rhs) == 2 * B * D * H
    assert count(jax.grad(loss, argnums=(0, 1)), X, rhs) == 3 * 2 * B * D * H


def test_shard_map_counts_every_device():
    mesh = train.make_mesh(4, 2)
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    # The axis "model" does the same work twice: that is work, and it is counted.
    assert count(fn, X, W) == 2 * ONE


def test_kernels_count_their_grid():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(x, w):
        return pallas.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[
                pallas.BlockSpec((B // 2, D), lambda i: (i, 0)),
                pallas.BlockSpec((D, D), lambda i: (0, 0)),
            ],
            out_specs=pallas.BlockSpec((B // 2, D), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((B, D), jnp.float32),
            interpret=True,
        )(x, w)

    assert count(fn, X, W) == ONE
