"""Small convex programs over tasks: bounded, jittable, batchable, float32-proof."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.aggregation import _rows
from mtl_jax.transforms.aggregation._cosine import cosine_gram, dot

_DEPENDENT = 4e-6  # squared sine of an angle that float32 inner products cannot tell
_FLAT = 1e-6  # a slope that rounding explains
_FEW = 32  # tasks up to which one tableau per row is cheaper
_BLOCK = 8  # rows whose tables stay in cache together


def _tiny(like: chex.Array) -> chex.Array:
    return jnp.asarray(jnp.finfo(like.dtype).tiny, like.dtype)


def project_simplex(vector: chex.Array, total: chex.Array | float = 1.0) -> chex.Array:
    r"""The nearest point with non-negative entries that sum to `total`.

      x = max(v - theta, 0),  theta = max_k (sum of the k largest v - total) / k

    Args:
      vector: [T].
      total: of the entries; positive.

    Returns:
      [T].

    >>> project_simplex(jnp.array([0.5, 2.0, 1.5])).tolist()
    [0.0, 0.75, 0.25]
    """
    ranks = jnp.arange(1, vector.shape[0] + 1, dtype=vector.dtype)
    # Shifting changes nothing but keeps the sums small.
    vector = vector - jnp.max(vector)
    excess = jnp.cumsum(-jnp.sort(-vector)) - total
    return jnp.maximum(vector - jnp.max(excess / ranks), 0)


def nonnegative_path(
    matrix: chex.Array,
    offset: chex.Array,
    slope: chex.Array,
    *,
    end: float = 0.0,
    radius: chex.Array | None = None,
) -> chex.Array:
    r"""Follows the minimisers of a quadratic over x >= 0 as one number falls.

      x(mu) = argmin_{x >= 0} 1/2 x^T A x + (q + mu r)^T x

    starts at zero for large mu and is linear between events at which one entry becomes
    positive or returns to zero. Each event is one principal pivot, a rank-one update of
    a [T, T + 2] table: finite, exact but for rounding.

    Args:
      matrix: A, [T, T], positive semi-definite with ones (or zeros) on the diagonal.
      offset: q, [T].
      slope: r, [T], positive.
      end: value of mu at which to stop.
      radius: stop earlier, where `x^T A x` reaches its square.

    Returns:
      x, [T]. Where x would run off to infinity the path stops before it does.

    **Follows**: Cottle, Pang, Stone 1992, "The Linear Complementarity Problem", 4.5
      (parametric principal pivoting).

    >>> a = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    >>> nonnegative_path(a, jnp.array([-1.0, -2.0]), jnp.ones(2)).tolist()
    [0.0, 2.0]
    """
    count = offset.shape[0]
    rows, columns = jnp.arange(count), jnp.arange(count + 2)

    def events(table, mu, positive):
        """The next entry to change, and how far mu falls before it and at most."""
        heights = jnp.maximum(table[:, count] + mu * table[:, count + 1], 0)
        slopes = table[:, count + 1]
        falls = slopes > _FLAT
        waits = jnp.where(falls, heights / jnp.where(falls, slopes, 1), jnp.inf)
        room = mu - end
        if radius is not None:
            x = jnp.where(positive, heights, 0)
            room = jnp.minimum(room, _reach(x, mu, positive, slopes))
        return jnp.argmin(waits), jnp.min(waits), room

    def _reach(x, mu, positive, slopes):
        """Fall of mu that brings x, moving against `slopes`, to the radius."""
        square = jnp.sum(x * -(offset + mu * slope))
        cross = jnp.maximum(jnp.sum(x * slope), 0)
        speed = jnp.maximum(jnp.sum(jnp.where(positive, -slopes, 0) * slope), 0)
        left = jnp.maximum(radius * radius - square, 0)
        rate = cross + jnp.sqrt(cross * cross + speed * left)
        fall = jnp.where(rate > 0, left / jnp.where(rate > 0, rate, 1), jnp.inf)
        return jnp.where(left > 0, fall, 0)

    def step(carry):
        table, mu, positive, _, steps = carry
        k, wait, room = events(table, mu, positive)
        pivot = table[k, k]
        done = (room <= wait) | (~positive[k] & (pivot < _DEPENDENT))
        fall = jnp.minimum(room, wait)
        mu = mu - jnp.where(jnp.isfinite(fall), fall, 0)
        pivot = jnp.where(done, 1, pivot)
        row, column = table[k] / pivot, table[:, k]
        here, there = (rows == k)[:, None], (columns == k)[None, :]
        swapped = jnp.where(here, -row[None, :], table - column[:, None] * row[None, :])
        turned = jnp.where(here, 1 / pivot, column[:, None] / pivot)
        table = jnp.where(done, table, jnp.where(there, turned, swapped))
        positive = jnp.where(done, positive, positive ^ (rows == k))
        return table, mu, positive, done, steps + 1

    def going(carry):
        return ~carry[3] & (carry[4] < 4 * count + 8)

    table = jnp.concatenate([matrix, offset[:, None], slope[:, None]], 1)
    mu = jnp.maximum(jnp.max(-offset / slope), end)
    start = table, mu, jnp.zeros(count, bool), jnp.zeros((), bool), 0
    table, mu, positive, _, _ = jax.lax.while_loop(going, step, start)
    heights = table[:, count] + mu * table[:, count + 1]
    return jnp.where(positive, jnp.maximum(heights, 0), 0)


def spread_slope(like: chex.Array) -> chex.Array:
    """Numbers just above one, all different, so that events come one by one."""
    turns = np.arange(like.shape[0]) * 0.6180339887498949 % 1
    return jnp.asarray(1 + turns / 16, like.dtype)


def min_norm_point(gram: chex.Array) -> chex.Array:
    r"""The convex combination of the tasks' gradients that is shortest.

      min_w w^T G w   such that   w >= 0, sum w = 1

    is, up to length, `min_{x >= 0} x^T G x + (sum x - 1)^2`.

    Args:
      gram: G, [T, T].

    Returns:
      [T]; the tasks without a gradient share all the weight where there are any.

    >>> [round(x, 3) for x in min_norm_point(jnp.diag(jnp.array([1.0, 4.0]))).tolist()]
    [0.8, 0.2]
    """
    cosines, _, inverse = cosine_gram("min_norm_point", gram)
    still = inverse == 0
    pull = inverse / jnp.maximum(jnp.max(inverse), _tiny(gram))
    # A task without a gradient is kept out of the table by a diagonal of one.
    matrix = (
        cosines + pull[:, None] * pull[None, :] + jnp.diag(still.astype(gram.dtype))
    )
    x = nonnegative_path(matrix, -pull, spread_slope(pull)) * pull
    moving = x / jnp.maximum(jnp.sum(x), _tiny(gram))
    shared = still.astype(gram.dtype)
    shared = shared / jnp.maximum(jnp.sum(shared), 1)
    return jnp.where(jnp.any(still), shared, moving)


def quadratic_above(
    matrix: chex.Array, lower: chex.Array, *, ridge: float
) -> chex.Array:
    r"""Minimises many quadratics of one matrix above lower bounds.

      min_v 1/2 v^T A v   such that   v >= l,   one v for each row l of `lower`

    Exactly, by `nonnegative_path`, where there is one row or there are few tasks. For
    many, iterations over all rows at once are cheaper; rows that do not settle follow
    their paths, a few at a time.

    Args:
      matrix: A, [T, T], positive definite.
      lower: [N, T].
      ridge: positive; what A has on its diagonal beside a Gramian.

    Returns:
      [N, T].

    >>> a = jnp.array([[1.0, -0.5], [-0.5, 1.0]])
    >>> quadratic_above(a, jnp.eye(2), ridge=0.1).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    cosines, norms, inverse = cosine_gram("quadratic_above", matrix)
    bounds = lower * norms[None, :]
    sizes = jnp.maximum(jnp.max(jnp.abs(bounds), 1, keepdims=True), _tiny(lower))
    bounds = bounds / sizes
    slope = spread_slope(inverse)
    follow = jax.vmap(lambda q: nonnegative_path(cosines, q, slope))
    if lower.shape[0] == 1 or lower.shape[1] <= _FEW:
        above = follow(dot(bounds, cosines))
    else:
        above, settled = _rows.solve_rows(cosines, ridge * inverse**2, bounds)
        above = _in_blocks(follow, dot(bounds, cosines), above, settled)
    return lower + above * sizes * inverse[None, :]


def _in_blocks(f, inputs, outputs, skip):
    """`f(inputs)` by blocks of rows; `outputs` as they are where `skip` is true."""
    count, width = inputs.shape
    rows = min(_BLOCK, count)
    order = jnp.argsort(skip)  # What is to be done comes first.
    wanted = jnp.sum(~skip, dtype=jnp.int32)

    def block(i, outputs):
        # The last block starts early where it would not fit, and repeats some rows.
        at = jnp.minimum(i * rows, count - rows)
        these = jax.lax.dynamic_slice(order, (at,), (rows,))
        return outputs.at[these].set(f(inputs[these]))

    return jax.lax.fori_loop(0, (wanted + rows - 1) // rows, block, outputs)
