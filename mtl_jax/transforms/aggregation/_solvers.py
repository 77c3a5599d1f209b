"""Small convex programs over tasks: bounded, jittable, batchable, float32-proof."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

_DEPENDENT = 4e-6  # squared sine of an angle that float32 inner products cannot tell
_FLAT = 1e-6  # a slope that rounding explains
_FEW = 32  # tasks up to which one tableau per row is cheaper than sweeps
_SWEEPS = 12
_CG_STEPS = 200


def unit_diagonal(gram: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Rescales the tasks to length one.

    Args:
      gram: [T, T], positive semi-definite.

    Returns:
      cosines [T, T], with ones on the diagonal but for tasks without a gradient; and
      the inverse lengths [T], zero for those tasks.
    """
    squares = jnp.diag(gram)
    known = squares > 0
    inverse = jnp.where(known, jax.lax.rsqrt(jnp.where(known, squares, 1)), 0)
    return gram * inverse[:, None] * inverse[None, :], inverse


def project_simplex(vector: chex.Array, total: float = 1.0) -> chex.Array:
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
        return jnp.where(rate > 0, left / jnp.where(rate > 0, rate, 1), jnp.inf)

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
    cosines, inverse = unit_diagonal(gram)
    still = inverse == 0
    pull = inverse / jnp.maximum(jnp.max(inverse), _tiny(gram))
    # A task without a gradient is kept out of the table by a diagonal of one.
    matrix = (
        cosines + pull[:, None] * pull[None, :] + jnp.diag(still.astype(gram.dtype))
    )
    x = nonnegative_path(matrix, -pull, spread_slope(pull)) * pull
    moving = x / jnp.maximum(jnp.sum(x), _tiny(gram))
    shared = still / jnp.maximum(jnp.sum(still.astype(gram.dtype)), 1)
    return jnp.where(jnp.any(still), shared.astype(gram.dtype), moving)


def quadratic_above(matrix: chex.Array, lower: chex.Array) -> chex.Array:
    r"""Minimises many quadratics of one matrix above lower bounds.

      min_v 1/2 v^T A v   such that   v >= l,   one v for each row l of `lower`

    Args:
      matrix: A, [T, T], positive definite.
      lower: [N, T].

    Returns:
      [N, T]. By `nonnegative_path` where N is one or T is small, by
      `lower_bounded_qp` otherwise.

    >>> a = jnp.array([[1.0, -0.5], [-0.5, 1.0]])
    >>> quadratic_above(a, jnp.eye(2)).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    if lower.shape[0] > 1 and lower.shape[1] > _FEW:
        return lower_bounded_qp(matrix, lower)
    cosines, inverse = unit_diagonal(matrix)
    slope = spread_slope(inverse)
    offsets = (lower @ matrix) * inverse
    sizes = jnp.maximum(jnp.max(jnp.abs(offsets), 1, keepdims=True), _tiny(lower))
    follow = jax.vmap(lambda q: nonnegative_path(cosines, q, slope))
    return lower + follow(offsets / sizes) * sizes * inverse


def lower_bounded_qp(matrix: chex.Array, lower: chex.Array) -> chex.Array:
    r"""Minimises many quadratics of one matrix above lower bounds.

      min_v 1/2 v^T A v   such that   v >= l,   one v for each row l of `lower`

    A few sweeps of coordinate descent settle the mild problems; what is left goes to
    conjugate gradients on the free entries, with projected steps where bounds are met
    (Dostal & Schoeberl 2005, "Minimizing Quadratic Functions Subject to Bound
    Constraints with the Rate of Convergence and Finite Termination").

    Args:
      matrix: A, [T, T], positive definite.
      lower: [N, T].

    Returns:
      [N, T].

    >>> a = jnp.array([[1.0, -0.5], [-0.5, 1.0]])
    >>> lower_bounded_qp(a, jnp.eye(2)).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    cosines, inverse = unit_diagonal(matrix)
    lengths = jnp.sqrt(jnp.diag(matrix))
    lower = lower * lengths
    size = jnp.maximum(jnp.max(jnp.abs(lower), 1, keepdims=True), _tiny(lower))
    lower = lower / size
    start, settled = _coordinate_descent(cosines, lower)
    found = _bounded_cg(cosines, lower, start, settled)
    return jnp.maximum(found, lower) * size * inverse


def _tiny(like: chex.Array) -> chex.Array:
    return jnp.asarray(jnp.finfo(like.dtype).tiny, like.dtype)


def _tolerance(like: chex.Array) -> float:
    """A gradient that rounding explains, for rows of size one."""
    return 10 * float(jnp.finfo(like.dtype).eps)


def _coordinate_descent(cosines, lower):
    """Gauss-Seidel over tasks, all rows at once: a point, and whether it stands."""
    tolerance = _tolerance(lower)
    bounds = lower.T

    def visit(j, point):
        moved = point[j] - cosines[j] @ point
        return point.at[j].set(jnp.maximum(bounds[j], moved))

    def sweep(carry):
        point, _, count = carry
        moved = jax.lax.fori_loop(0, lower.shape[1], visit, point)
        return moved, jnp.max(jnp.abs(moved - point)), count + 1

    def moving(carry):
        return (carry[1] > tolerance) & (carry[2] < _SWEEPS)

    infinite = jnp.full((), jnp.inf, lower.dtype)
    point, change, _ = jax.lax.while_loop(moving, sweep, (bounds, infinite, 0))
    return point.T, change <= tolerance


def _bounded_cg(matrix, lower, start, settled):
    """Proportioning with reduced gradient projections, all rows at once."""
    tolerance = _tolerance(lower)
    # The largest eigenvalue is at most the largest row sum.
    stride = 1.9 / jnp.max(jnp.sum(jnp.abs(matrix), 1))

    def split(point, gradient):
        """The gradient where the point may move both ways, and where only upwards."""
        free = point > lower
        return (
            jnp.where(free, gradient, 0),
            jnp.where(free, 0, jnp.minimum(gradient, 0)),
        )

    def row_sum(x):
        return jnp.sum(x, 1, keepdims=True)

    def step(carry):
        point, gradient, direction, _, count = carry
        free, pinned = split(point, gradient)
        reduced = jnp.minimum((point - lower) / stride, free)
        proportional = row_sum(pinned * pinned) <= row_sum(reduced * free)
        direction = jnp.where(proportional, direction, pinned)
        image = direction @ matrix
        curvature = row_sum(direction * image)
        inverse = jnp.where(
            curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0
        )
        wanted = row_sum(gradient * direction) * inverse
        falls = direction > 0
        room = (point - lower) / jnp.where(falls, direction, 1)
        allowed = jnp.min(jnp.where(falls, room, jnp.inf), 1, keepdims=True)
        whole = ~proportional | (wanted <= allowed)
        length = jnp.where(whole, wanted, allowed)
        point = jnp.maximum(point - length * direction, lower)
        gradient = gradient - length * image
        free, _ = split(point, gradient)
        conjugate = free - row_sum(free * image) * inverse * direction
        # A row that met a bound goes on along its gradient and is projected back.
        point = jnp.where(whole, point, jnp.maximum(point - stride * free, lower))
        gradient = jax.lax.cond(
            jnp.all(whole), lambda p, g: g, lambda p, g: p @ matrix, point, gradient
        )
        free, pinned = split(point, gradient)
        direction = jnp.where(whole & proportional, conjugate, free)
        return point, gradient, direction, jnp.max(jnp.abs(free + pinned)), count + 1

    def moving(carry):
        return (carry[3] > tolerance) & (carry[4] < _CG_STEPS)

    gradient = start @ matrix
    free, _ = split(start, gradient)
    infinite = jnp.full((), jnp.inf, lower.dtype)
    error = jnp.where(settled, 0, infinite)
    return jax.lax.while_loop(moving, step, (start, gradient, free, error, 0))[0]
