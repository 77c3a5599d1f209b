"""Sums over tasks and products between tasks of one leaf, at the speed of memory.

XLA's CPU backend slices 16-bit floats one by one, integers many at once; it contracts
two tall arrays fast only where they stay in the cache, and on several cores only where
there are several contractions in one.
"""

from typing import Any

import jax
import jax.numpy as jnp

_COMBINE_BLOCK = 32  # tasks
# Elements of a slice, all tasks together, that stay in cache; and least of each task.
_GRAM_BLOCK, _GRAM_COLUMNS = 57344, 3584
# Slices at once, and of what their columns are a multiple.
_GRAM_PARTS, _GRAM_LANES = 4, 16


def weighted_sum(x: jax.Array, w: jax.Array) -> jax.Array:
    """`sum_t w[t] * x[t]`, x [T, ...], w [T], in the dtype of w."""
    if x.dtype.itemsize != 2:
        return _sum(x, w)
    return jax.lax.platform_dependent(x, w, cpu=_sum_bits, default=_sum)


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """[T, ...] and [U, ...] -> inner products between tasks [T, U] float32."""
    pair = (x,) if y is x else (x, y)  # What is read once need not be cut twice.
    # Slicing a flat view would gather a sharded leaf; one device shards nothing.
    if jax.device_count() > 1 or x.size <= _GRAM_BLOCK:
        return _products(*pair)
    return jax.lax.platform_dependent(*pair, cpu=_products_blocked, default=_products)


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


def _products(*pair: jax.Array) -> jax.Array:
    """One or two [T, ...] -> [T, T] in one contraction; no sharded axis is reshaped."""
    axes = tuple(range(1, pair[0].ndim))
    return _contract(pair, ((axes, axes), ((), ())))


def _contract(pair: tuple[jax.Array, ...], dims: Any) -> jax.Array:
    """Of one array with itself, or of two, to float32."""
    return jax.lax.dot_general(
        pair[0], pair[-1], dims, precision="highest", preferred_element_type=jnp.float32
    )


@jax.custom_jvp
def _products_blocked(*pair: jax.Array) -> jax.Array:
    """The same by slices of the flat views, some at once, which stay in cache."""
    parts, steps, block = _slices(max(len(x) for x in pair), pair[0][0].size)
    step = parts * block

    def view(x):
        x = x.reshape(x.shape[0], -1)
        narrow = x.dtype.itemsize == 2
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x

    views = [view(x) for x in pair]

    def floats(cut):
        """Of every view, what `cut` takes from it, as float32."""
        cuts = (
            jax.lax.bitcast_convert_type(cut(v), x.dtype)
            for v, x in zip(views, pair, strict=True)
        )
        return [x.astype(jnp.float32) for x in cuts]

    def add(i, total):
        # One slice of all parts would be copied entry by entry.
        columns = (
            floats(
                lambda v, s=i * step + part * block: jax.lax.dynamic_slice(
                    v, (0, s), (v.shape[0], block)
                )
            )
            for part in range(parts)
        )
        stacked = [jnp.stack(x) for x in zip(*columns, strict=True)]
        return total + _contract(stacked, (((2,), (2,)), ((0,), (0,))))

    rest = _products(*floats(lambda v: v[:, steps * step :]))
    start = jnp.zeros((parts, *rest.shape), rest.dtype)
    return jnp.sum(jax.lax.fori_loop(0, steps, add, start), 0) + rest


def _slices(count: int, length: int) -> tuple[int, int, int]:
    """(slices at once, how often, columns of each) of arrays [count, length].

    What is left over is shorter than that many lanes.
    """
    block = max(_GRAM_BLOCK // count // 128 * 128, _GRAM_COLUMNS)
    at_once = max(_GRAM_PARTS * _GRAM_BLOCK // (count * block), 1)
    blocks = max(length // block, 1)
    steps = -(-blocks // at_once)
    parts = -(-blocks // steps)
    return parts, steps, length // (steps * parts) // _GRAM_LANES * _GRAM_LANES


@_products_blocked.defjvp
def _products_blocked_jvp(primals, tangents):
    """Slices of integers have no slope, and slices kept for one would be copies."""
    (x, *_, y), (dx, *_, dy) = primals * 2, tangents * 2
    return _products_blocked(*primals), _products(dx, y) + _products(x, dy)
