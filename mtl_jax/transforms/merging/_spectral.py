"""Matrices of a task tree, their singular vectors, and their nearest isometries.

A spectral merge is one function of a stack of matrices: which leaves are matrices, how
leaves of more axes are seen as such, and what becomes of the others is decided here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _compose

Matrices = Callable[[str, tuple[int, ...]], Any] | None
Layout = Literal["in_out", "out_in"]
Svd = Literal["svd", "gram"]
TopSvd = Literal["svd", "gram", "sketch"]
Polar = Literal["svd", "gram", "newton"]
LAYOUT, SVD, TOP_SVD, POLAR = map(get_args, (Layout, Svd, TopSvd, Polar))

# Smallest singular value, relative to the largest, that quick polar factors bring to 1.
_NEWTON_LOW, _HALLEY_LOW = 1e-4, 3e-5
_HALLEY_STEPS, _POWER_STEPS, _OVERSAMPLE = 2, 2, 16


class View(NamedTuple):
    """A leaf as matrices: `lead` axes batched, `rows` axes as rows, others columns."""

    lead: int
    rows: int


def views(fn_name: str, taus: Any, matrices: Matrices) -> dict[str, View]:
    """Leaf name -> view, of the leaves that are matrices.

    Args:
      fn_name: on whose behalf.
      taus: task tree.
      matrices: (name, shape without tasks) -> False or None for a leaf that is none;
        True for matrices in the last two axes, all axes before them batched; or
        (lead, rows). None: leaves of exactly two axes.

    Raises:
      ValueError: an answer that does not fit the leaf, or a complex matrix.
    """
    found = {}
    for name, leaf in named_leaves(taus).items():
        shape = tuple(leaf.shape[1:])
        if not tree.is_inexact(leaf) or not leaf.size:
            continue
        answer = len(shape) == 2 if matrices is None else matrices(name, shape)
        if answer is None or answer is False:
            continue
        try:
            view = View(len(shape) - 2, 1) if answer is True else View(*answer)
            fits = view.lead >= 0 < view.rows and view.lead + view.rows < len(shape)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{fn_name}: matrices gives {answer!r} for {name!r} of {shape}, wanted "
                "a bool or (leading axes, row axes) that leave an axis for columns"
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"{fn_name}: {name!r} is {leaf.dtype}, wanted a real dtype"
            )
        found[name] = view
    return found


def to_matrices(x: jax.Array, view: View, layout: Layout, front: int = 1) -> jax.Array:
    """[T, ...] -> [T, B, m, n] in a wide dtype; m are outputs where it is "in_out"."""
    shape = x.shape[front:]
    batch = math.prod(shape[: view.lead])
    rows = math.prod(shape[view.lead : view.lead + view.rows])
    x = x.reshape(*x.shape[:front], batch, rows, -1).astype(tree.wide_dtype(x.dtype))
    return jnp.swapaxes(x, -1, -2) if layout == "in_out" else x


def from_matrices(y: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """[B, m, n] -> the shape and dtype of one task of `like`."""
    y = jnp.swapaxes(y, -1, -2) if layout == "in_out" else y
    return y.reshape(like.shape[1:]).astype(like.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _merge_leaf(x, weights, view, layout, rule, options):
    y = to_matrices(x, view, layout)
    y = y * weights.astype(y.dtype)[:, None, None, None]
    return from_matrices(rule(y, *options), x, layout)


def merge(
    fn_name: str,
    taus: Any,
    weights: Any,
    matrices: Matrices,
    rule: Callable[..., jax.Array],
    options: tuple[Any, ...],
    *,
    layout: Layout = "out_in",
    smallest: int | Literal["tasks"] = 1,
    check_finite: bool = True,
) -> Any:
    """Merges matrices by a rule, and everything else by the weighted mean.

    Args:
      fn_name: on whose behalf.
      taus: task tree, leaves [T, ...].
      weights: [T] or None for ones; they multiply the task vectors before the rule.
      matrices: see `views`.
      rule: (float [T, B, m, n], *options) -> [B, m, n]; a function of a module, so
        that equal calls compile once.
      options: hashable.
      layout: "in_out" hands leaves [in, out] to the rule as [out, in].
      smallest: matrices whose smaller side is less, or less than T, go to the mean.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.
    """
    _compose.choice(fn_name, "layout", layout, LAYOUT)
    count, weights = _compose.check_taus(fn_name, taus, weights, check_finite)
    _compose.check_total(fn_name, weights)
    smallest = count if smallest == "tasks" else smallest
    seen = views(fn_name, taus, matrices)

    def leaf(name, x):
        view = seen.get(name)
        if view is None or min(_sides(x.shape[1:], view)) < smallest:
            return tree.combine({name: x}, weights / weights.sum())[name]
        return _merge_leaf(x, weights, view, layout, rule, options)

    return tree.map_with_path(leaf, taus)


def _sides(shape: tuple[int, ...], view: View) -> tuple[int, int]:
    inner = shape[view.lead :]
    return math.prod(inner[: view.rows]), math.prod(inner[view.rows :])


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., m, k] @ [..., k, n] in full float32."""
    return jnp.matmul(x, y, precision="highest")


def transpose(x: jax.Array) -> jax.Array:
    """[..., m, n] -> [..., n, m]."""
    return jnp.swapaxes(x, -1, -2)


def inverse(x: jax.Array) -> jax.Array:
    """1 / x where x is not 0, else 0."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def svd(
    x: jax.Array, rank: int | None = None, method: TopSvd = "svd"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading singular triplets; directions that are rounding only are zeros.

    Args:
      x: [..., m, n].
      rank: how many; None for min(m, n).
      method: "svd" is LAPACK's or the backend's. "gram" takes one side from the
        eigenvectors of the smaller of x x^T and x^T x: several times faster, but
        vectors of singular values below about 3e-4 of the largest (float32) are mixed
        with each other. "sketch" does the same in a random subspace of twice as many,
        and 16, found by two power steps with shifts: for a few of many singular values
        that fall.

    Returns:
      u [..., m, rank], s [..., rank] descending, v^T [..., rank, n].
    """
    m, n = x.shape[-2:]
    rank = min(m, n) if rank is None else rank
    if method == "svd":
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    elif method == "gram" or (width := 2 * rank + _OVERSAMPLE) >= min(m, n):
        u, s, vt = _gram_svd(x, rank)
    else:
        q = _leading(x, width)
        u, s, vt = _gram_svd(matmul(transpose(q), x), rank)
        u = matmul(q, u)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    real = s > _rounding(max(m, n), x.dtype) * s[..., :1]
    one = real.astype(x.dtype)
    return u * one[..., None, :], s * one, vt * one[..., None]


def _rounding(side: int, dtype: Any) -> float:
    """Singular values up to this share of the largest are taken for rounding.

    Rounding errors are random: their norm grows with the root of the side. The side
    itself, as in NumPy's `matrix_rank`, is 1.2e-4 at 1024 in float32, and the smallest
    singular value of one square random matrix in four is less.
    """
    return min(side, 4 * math.sqrt(side)) * float(jnp.finfo(dtype).eps)


def _leading(x, width):
    """A basis [..., m, width] of about the leading left singular vectors.

    Power steps with shifts, x x^T - r, whose product is the Chebyshev polynomial that
    is small on [0, b], where b is the smallest Ritz value of the first step.
    """
    y = matmul(x, jax.random.normal(jax.random.key(0), (x.shape[-1], width), x.dtype))
    # Chebyshev's roots on [0, 1].
    roots = np.sin(np.pi * (np.arange(_POWER_STEPS) + 0.5) / (2 * _POWER_STEPS)) ** 2
    top = None
    for root in roots.tolist():
        # Kept as rows, since x^T y is slow on CPUs.
        left = orthonormal_rows(transpose(y))
        right = matmul(left, x)
        gram = matmul(right, transpose(right))
        if top is None:
            top = jnp.linalg.eigvalsh(gram)[..., :1, None]
        scale = _whitener(gram)
        y = matmul(x, transpose(matmul(scale, right)))
        y = y - root * top * transpose(matmul(scale, left))
    # Twice, as of small ones once leaves something of the large ones in them.
    return transpose(orthonormal_rows(orthonormal_rows(transpose(y))))


def orthonormal_rows(x: jax.Array) -> jax.Array:
    """Rows orthogonal to those before, of norm 1 but for small ones: [..., m, n].

    By Cholesky's factor of the Gramian, lifted so that it exists: products of matrices
    for the most part, several times faster than Householder's reflections.
    """
    return matmul(_whitener(matmul(x, transpose(x))), x)


def _whitener(gram):
    """The inverse of Cholesky's factor."""
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    lift = jnp.where(size > 0, jnp.finfo(gram.dtype).eps * size, 1)
    return _inverse_factor(gram + lift * identity(gram))


def _inverse_factor(gram):
    factor, one = jnp.linalg.cholesky(gram), identity(gram)
    return jax.lax.linalg.triangular_solve(factor, one, left_side=True, lower=True)


def identity(like: jax.Array) -> jax.Array:
    """Of the shape [..., n, n] of an array."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _gram_svd(x, rank):
    if x.shape[-2] > x.shape[-1]:
        u, s, vt = _gram_svd(transpose(x), rank)
        return transpose(vt), s, transpose(u)
    # Norms of the rows are more accurate than roots of eigenvalues.
    u = jnp.linalg.eigh(matmul(x, transpose(x)))[1][..., ::-1][..., :rank]
    rows = matmul(transpose(u), x)
    s = jnp.linalg.norm(rows, axis=-1)
    return u, s, rows * inverse(s)[..., None]


def polar(x: jax.Array, method: Polar = "svd") -> jax.Array:
    """The nearest partial isometry, u v^T over the singular values that are not 0.

    Args:
      x: [..., m, n].
      method: "svd" drops singular values that are rounding (`_rounding`). "gram", two
        steps of Halley's iteration by Cholesky's factors and one of Newton-Schulz, and
        "newton", matrix products alone, bring singular values below about 1e-4 of the
        largest ("gram" 3e-5) only part of the way, the others to 1 within about 1e-3.

    Returns:
      [..., m, n]; zeros where x is zero.
    """
    if x.shape[-2] < x.shape[-1]:
        return transpose(polar(transpose(x), method))
    if method == "svd":
        u, _, vt = svd(x)
        return matmul(u, vt)
    # |(x^T x)^2|_F^(1/4) is at least the largest singular value, and close to it.
    y = x * inverse(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))
    gram = matmul(transpose(y), y)
    top = jnp.linalg.norm(matmul(gram, gram), axis=(-2, -1), keepdims=True) ** 0.25
    y, gram = y * inverse(top), gram * inverse(top) ** 2
    if method == "newton":
        steps = jnp.asarray(_newton_steps(_NEWTON_LOW), x.dtype)
        return jax.lax.scan(lambda y, c: (_step(y, c), None), y, steps)[0]
    halley, last = _halley_steps(_HALLEY_LOW)
    for i, (a, b, c) in enumerate(halley):
        gram = matmul(transpose(y), y) if i else gram
        z = _inverse_factor(c * gram + identity(gram))
        y = b / c * y + (a - b / c) * matmul(matmul(y, transpose(z)), z)
    return _step(y, last)


def _step(x, coefficients):
    """A x + b x (x^T x) + c x (x^T x)^2."""
    a, b, c = coefficients
    gram = matmul(transpose(x), x)
    square = matmul(gram, gram) if not isinstance(c, float) or c else 0.0
    return a * x + matmul(x, b * gram + c * square)


@functools.cache
def _halley_steps(low: float) -> tuple[list[tuple[float, ...]], tuple[float, ...]]:
    """Rational x (a + b x^2) / (1 + c x^2) that take [low, 1] near 1; a quintic after.

    Follows: Nakatsukasa, Bai & Gygi 2010, "Optimizing Halley's iteration", eq. 3.9.
    """
    steps = []
    for _ in range(_HALLEY_STEPS):
        square = low * low
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        low *= (a + b * square) / (1 + c * square)
        steps.append((a, b, c))
    return steps, tuple(float(c) for c in _minimax(low)[0])


@functools.cache
def _newton_steps(low: float) -> tuple[tuple[float, float, float], ...]:
    """Odd quintics that bring [low, 1] to 1: each the minimax one of what is left.

    Follows: Amsel et al. 2025, "The Polar Express", by an exchange algorithm.
    """
    steps = []
    while low < 0.9:
        step, error = _minimax(low)
        top = 1.01 * (
            1 + error
        )  # Above 1 the slope is steep: rounding must not get there.
        steps.append(tuple(float(c) / top for c in step))
        low = (1 - error) / top
    return (*steps, *[(1.875, -1.25, 0.375)] * 2)


def _minimax(low: float) -> tuple[np.ndarray, float]:
    """(a, b, c) and max |1 - a x - b x^3 - c x^5| on [low, 1], at its smallest."""
    inner = low + (1 - low) * np.array([0.25, 0.75])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(60):
        points = np.array([low, *inner, 1.0])
        system = np.stack([points, points**3, points**5, signs], 1)
        *step, error = np.linalg.solve(system, np.ones(4))
        a, b, c = step
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sort(
            np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        )
    return np.array(step), abs(float(error))
