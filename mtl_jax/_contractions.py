"""Sums over tasks and products between tasks of one leaf, at the speed of memory.

XLA's CPU backend slices 16-bit floats one by one, integers many at once; it contracts
two tall arrays fast only where they stay in the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

_COMBINE_BLOCK = 32  # tasks
# Elements of a slice, all tasks together, that stay in cache; and least of each task.
_GRAM_BLOCK, _GRAM_COLUMNS = 57344, 3584


def weighted_sum(x: jax.Array, w: jax.Array) -> jax.Array:
    """`sum_t w[t] * x[t]`, x [T, ...], w [T], in the dtype of w."""
    if x.dtype.itemsize != 2:
        return _sum(x, w)
    return jax.lax.platform_dependent(x, w, cpu=_sum_bits, default=_sum)


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """[T, ...] and [U, ...] -> inner products between tasks [T, U] float32."""
    # Slicing a flat view would gather a sharded leaf; one device shards nothing.
    if jax.device_count() > 1 or x.size <= _GRAM_BLOCK:
        return _products(x, y)
    return jax.lax.platform_dependent(x, y, cpu=_products_blocked, default=_products)


def _sum(x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """`sum_t w[t] * x[t]` in the dtype of w; x may be the bits of a dtype."""
    blocks = -(-x.shape[0] // _COMBINE_BLOCK)
    size = x.shape[0] // blocks
    first = x.shape[0] - (blocks - 1) * size

    def read(row):
        row = row if dtype is None else jax.lax.bitcast_convert_type(row, dtype)
        return row.astype(w.dtype)

    def written_out(x, w):
        terms = [w[t] * read(x[t]) for t in range(x.shape[0])]
        return sum(terms[1:], terms[0])

    def add(i, total):
        rows, weights = (
            jax.lax.dynamic_slice_in_dim(y, first + i * size, size) for y in (x, w)
        )
        return total + written_out(rows, weights)

    # Many tasks written out at once would take minutes to compile.
    return jax.lax.fori_loop(0, blocks - 1, add, written_out(x[:first], w[:first]))


@jax.custom_jvp
def _sum_bits(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same for 16-bit floats, sliced as integers; see `_products_blocked`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return _sum(bits, w, x.dtype)


@_sum_bits.defjvp
def _sum_bits_jvp(primals, tangents):
    """Integers have no slope, so the task tree's own is that of plain slices."""
    (x, w), (dx, dw) = primals, tangents
    slope = _sum(dx, w) + _sum(x, dw)
    return _sum_bits(x, w), slope


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    """[T, ...], [U, ...] -> [T, U] in one contraction; no sharded axis is reshaped."""
    axes = tuple(range(1, x.ndim))
    dims = ((axes, axes), ((), ()))
    return jax.lax.dot_general(
        x, y, dims, precision="highest", preferred_element_type=jnp.float32
    )


@jax.custom_jvp
def _products_blocked(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same by slices of the flat views: fast where memory is cached."""
    count, length = max(x.shape[0], y.shape[0]), x[0].size
    block = max(_GRAM_BLOCK // count // 128 * 128, _GRAM_COLUMNS)
    blocks = length // block

    def view(x):
        x = x.reshape(x.shape[0], -1)
        narrow = x.dtype.itemsize == 2
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x

    def of_parts(*parts):
        floats = (
            jax.lax.bitcast_convert_type(part, whole.dtype).astype(jnp.float32)
            for part, whole in zip(parts, (x, y), strict=True)
        )
        return _products(*floats)

    views = view(x), view(y)

    def add(i, total):
        parts = (
            jax.lax.dynamic_slice(v, (0, i * block), (v.shape[0], block)) for v in views
        )
        return total + of_parts(*parts)

    rest = of_parts(*(v[:, blocks * block :] for v in views))
    return jax.lax.fori_loop(0, blocks, add, rest)


@_products_blocked.defjvp
def _products_blocked_jvp(primals, tangents):
    """Slices of integers have no slope, and slices kept for one would be copies."""
    (x, y), (dx, dy) = primals, tangents
    return _products_blocked(x, y), _products(dx, y) + _products(x, dy)
