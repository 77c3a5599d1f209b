"""Matrices of a task tree, and their singular vectors.

A spectral merge is one function of a stack of matrices: which leaves are matrices, how
leaves of more axes are seen as such, and what becomes of the others is decided here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax._lapack import stacked
from mtl_jax.transforms.merging import _compose

Matrices = Callable[[str, tuple[int, ...]], Any] | None
Layout = Literal["in_out", "out_in"]
Svd = Literal["svd", "gram"]
TopSvd = Literal["svd", "gram", "sketch"]
LAYOUT, SVD, TOP_SVD = map(get_args, (Layout, Svd, TopSvd))

# Of a sketch: blocks of vectors; in each a share of the rank, and some more.
_STEPS, _SHARE, _SPARE = 8, 4, 12
# Squares of norms of rows from which a direction is there, and is orthonormal.
_THERE, _UNIT = 0.3, 0.99
# Of Gramians, how many times as much is rounding: up to 69 eps were found at a side of
# 64 and three quarters of the rank.
_GRAM = 8
# Eps of its norm that give a Gramian a Cholesky factor: up to 3.7 were needed, at sides
# of 32 to 3000 and ranks of 1 to half of that.
_FACTORED = 8
# Matrices up to this side are left to LAPACK.
_WHOLE = 256


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


def to_unit(x: jax.Array) -> jax.Array:
    """What brings the largest entry of x [..., m, n] to 1, so that squares exist.

    [..., 1, 1]; 0 where x is 0 or subnormal.
    """
    top = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    return inverse(jnp.where(top < jnp.finfo(x.dtype).tiny, 0, top))


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
        with each other. "sketch" does the same in a subspace of eight blocks, each of
        a quarter as many vectors, and 12, random ones and what x x^T makes of them: for
        a few of many singular values that fall. Of equal values it may miss some: those
        beyond the vectors of a block.

    Returns:
      u [..., m, rank], s [..., rank] descending, v^T [..., rank, n].
    """
    m, n = x.shape[-2:]
    rank = min(m, n) if rank is None else rank
    if method == "svd":
        u, s, vt = stacked(_thin_svd, x)
    elif method == "gram" or _STEPS * (block := rank // _SHARE + _SPARE) >= min(m, n):
        unit = to_unit(x)
        u, s, vt = _gram_svd(unit * x, rank)
        s = s * inverse(unit)[..., 0]
    else:
        q, right, unit = _krylov(x, block)
        u, s, vt = _gram_svd(right, rank)
        u, s = matmul(transpose(q), u), s * inverse(unit)[..., 0]
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    rounding = _rounding(max(m, n), x.dtype) * (1 if method == "svd" else _GRAM)
    real = s > rounding * s[..., :1]
    one = real.astype(x.dtype)
    return u * one[..., None, :], s * one, vt * one[..., None]


def _thin_svd(x):
    return tuple(jnp.linalg.svd(x, full_matrices=False))


def values(x: jax.Array) -> jax.Array:
    """All singular values, descending: [..., m, n] -> [..., min(m, n)]."""
    return stacked(jnp.linalg.svdvals, x)


def _rounding(side: int, dtype: Any) -> float:
    """Singular values up to this share of the largest are taken for rounding.

    Rounding errors are random: their norm grows with the root of the side. Measured in
    float32 at sides of 32 to 1024: at most 5 eps, 17 in sums of which most cancels. The
    side itself, as in NumPy's `matrix_rank`, is 1.2e-4 at 1024, and the smallest
    singular value of one square random matrix in four is less.
    """
    return (8 + math.sqrt(side)) * float(jnp.finfo(dtype).eps)


def _krylov(x, block):
    """Orthonormal rows q [..., w, m], near the leading left vectors, c q x, and c.

    Random vectors y x^T, and what x x^T makes of them in a few steps: the span of all
    steps has more of the leading vectors than the last of as many products with x.
    """
    m, n = x.shape[-2:]
    unit = to_unit(x)
    keys = jax.random.split(jax.random.key(0), _STEPS + 1)
    rows = jax.random.normal(keys[0], (*x.shape[:-2], block, n), x.dtype)
    blocks = []
    for key in keys[1:]:
        # As rows x^T, at half the time on CPUs.
        y = unit * transpose(matmul(x, transpose(rows)))
        spare = jax.random.normal(key, y.shape, x.dtype) / math.sqrt(m)
        y = _beyond(y, [z for z, _ in blocks], spare)
        right = unit * matmul(y, x)
        blocks.append((y, right))
        rows = orthonormal_rows(right)
    q, right = (jnp.concatenate(parts, -2) for parts in zip(*blocks, strict=True))
    return q, right, unit


def _beyond(y, spans, spare):
    """Orthonormal rows of what of y [..., b, m] is orthogonal to blocks of such rows.

    Directions that are there but for rounding become random ones.
    """
    q = jnp.concatenate(spans, -2) if spans else None
    # Twice, as of small ones once leaves something of the large ones in them.
    for least, other in ((_THERE, spare), (_UNIT, jnp.zeros_like(spare))):
        size = jnp.sum(y * y, (-2, -1))
        if q is not None:
            y = y - matmul(matmul(y, transpose(q)), q)
        y = orthonormal_rows(y, size)
        there = jnp.sum(y * y, -1, keepdims=True) > least
        y = jnp.where(there, y, other)
    return y


def orthonormal_rows(x: jax.Array, size: jax.Array | None = None) -> jax.Array:
    """Rows orthogonal to those before, of norm 1 but for small ones: [..., m, n].

    By Cholesky's factor of the Gramian, lifted so that it exists: products of matrices
    for the most part, several times faster than Householder's reflections.

    Args:
      x: [..., m, n].
      size: [...], sum of squares that rounding errors go with, if not those of x.
    """
    gram = matmul(x, transpose(x))
    lift = _FACTORED * jnp.linalg.norm(gram, axis=(-2, -1))
    if size is not None:
        lift = jnp.maximum(lift, size)
    lift = jnp.where(lift > 0, jnp.finfo(gram.dtype).eps * lift, 1)
    lifted = gram + lift[..., None, None] * identity(gram)
    return matmul(inverse_factor(lifted), x)


def inverse_factor(gram):
    """The inverse of Cholesky's factor, in halves, which are products of matrices."""
    side = gram.shape[-1]
    if side <= _WHOLE:
        return stacked(_triangular_inverse, stacked(jnp.linalg.cholesky, gram))
    half = side // 2
    first = inverse_factor(gram[..., :half, :half])
    below = matmul(gram[..., half:, :half], transpose(first))
    rest = gram[..., half:, half:] - matmul(below, transpose(below))
    second = inverse_factor(rest)
    corner = -matmul(matmul(second, below), first)
    zero = jnp.zeros_like(transpose(corner))
    top = jnp.concatenate([first, zero], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def _triangular_inverse(factor):
    one = identity(factor)
    return jax.lax.linalg.triangular_solve(factor, one, left_side=True, lower=True)


def identity(like: jax.Array) -> jax.Array:
    """Of the shape [..., n, n] of an array."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _gram_svd(x, rank):
    if x.shape[-2] > x.shape[-1]:
        u, s, vt = _gram_svd(transpose(x), rank)
        return transpose(vt), s, transpose(u)
    # Norms of the rows are more accurate than roots of eigenvalues.
    u = stacked(jnp.linalg.eigh, matmul(x, transpose(x)))[1][..., ::-1][..., :rank]
    rows = matmul(transpose(u), x)
    s = jnp.linalg.norm(rows, axis=-1)
    return u, s, rows * inverse(s)[..., None]
