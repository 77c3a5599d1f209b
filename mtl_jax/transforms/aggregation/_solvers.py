"""Small convex programs over tasks: bounded, jittable, batchable, float32-proof."""

import chex
import jax
import jax.numpy as jnp

_DEPENDENT = 4e-6  # squared sine of an angle that float32 inner products cannot tell
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
        inverse = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)
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
