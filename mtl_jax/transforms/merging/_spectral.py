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

# Smallest singular value, relative to the largest, that Newton-Schulz brings to one.
_NEWTON_LOW = 1e-4
_POWER_STEPS, _OVERSAMPLE = 3, 16


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
        with each other. "sketch" does the same in a random subspace of half as many
        again, and 16, found by three power steps: for a few of many singular values
        that fall fast.

    Returns:
      u [..., m, rank], s [..., rank] descending, v^T [..., rank, n].
    """
    m, n = x.shape[-2:]
    rank = min(m, n) if rank is None else rank
    if method == "svd":
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    elif method == "gram" or (width := rank + rank // 2 + _OVERSAMPLE) >= min(m, n):
        u, s, vt = _gram_svd(x, rank)
    else:
        start = jax.random.normal(jax.random.key(0), (n, width), x.dtype)
        y = matmul(x, start)
        for _ in range(_POWER_STEPS):
            y = matmul(x, _apart(matmul(transpose(x), _apart(y))))
        q = jnp.linalg.qr(y)[0]
        u, s, vt = _gram_svd(matmul(transpose(q), x), rank)
        u = matmul(q, u)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    real = s > max(m, n) * jnp.finfo(x.dtype).eps * s[..., :1]
    one = real.astype(x.dtype)
    return u * one[..., None, :], s * one, vt * one[..., None]


def _apart(y):
    """A well-conditioned basis of the columns, orthonormal but for small ones.

    By Cholesky's factor of the Gramian, lifted so that it exists: a quarter of the time
    of Householder's, and power steps need no more.
    """
    gram = matmul(transpose(y), y)
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    lift = jnp.where(size > 0, jnp.finfo(y.dtype).eps * size, 1)
    factor = jnp.linalg.cholesky(gram + lift * jnp.eye(y.shape[-1], dtype=y.dtype))
    return jax.lax.linalg.triangular_solve(
        factor, y, left_side=False, lower=True, transpose_a=True
    )


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
      method: "svd" drops singular values of max(m, n) eps and below. "gram",
        x (x^T x)^(-1/2) by eigenvectors and three Newton-Schulz steps, and "newton",
        matrix products alone, bring singular values below about 1e-4 of the largest
        only part of the way; the others to 1 within about 1e-4 where the matrix is
        small. On 1024 x 1024 sums of synthetic tasks with singular values i^-0.7
        (i^-1.5), 2e-2 ("newton") and 4e-2 (2e-1, "gram") of the norm were off.

    Returns:
      [..., m, n]; zeros where x is zero.
    """
    if x.shape[-2] < x.shape[-1]:
        return transpose(polar(transpose(x), method))
    if method == "svd":
        u, _, vt = svd(x)
        return matmul(u, vt)
    if method == "gram":
        values, vectors = jnp.linalg.eigh(matmul(transpose(x), x))
        tiny = jnp.finfo(x.dtype).tiny
        floor = jnp.maximum(4 * jnp.finfo(x.dtype).eps * values[..., -1:], tiny)
        roots = jax.lax.rsqrt(jnp.maximum(values, floor))[..., None, :]
        y = matmul(x, matmul(vectors * roots, transpose(vectors)))
        return jax.lax.fori_loop(0, 3, lambda _, y: _step(y, (1.5, -0.5, 0.0)), y)
    # |(x^T x)^2|_F^(1/4) is at least the largest singular value, and close to it.
    y = x * inverse(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))
    gram = matmul(transpose(y), y)
    top = jnp.linalg.norm(matmul(gram, gram), axis=(-2, -1), keepdims=True) ** 0.25
    steps = jnp.asarray(_newton_steps(_NEWTON_LOW), x.dtype)
    return jax.lax.scan(lambda y, c: (_step(y, c), None), y * inverse(top), steps)[0]


def _step(x, coefficients):
    """A x + b x (x^T x) + c x (x^T x)^2."""
    a, b, c = coefficients
    gram = matmul(transpose(x), x)
    square = matmul(gram, gram) if not isinstance(c, float) or c else 0.0
    return a * x + matmul(x, b * gram + c * square)


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
