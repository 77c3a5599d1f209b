"""Pruning of linear layers by what they see: Wanda and SparseGPT."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import share
from mtl_jax.transforms.merging import _compose, _grams, _spectral

Pattern = tuple[int, int]


def wanda_masks(
    taus: Any,
    grams: Any,
    *,
    density: float = 0.5,
    pattern: Pattern | None = None,
    layout: _spectral.Layout = "in_out",
    check_finite: bool = True,
) -> Any:
    r"""Marks the weights that, times the size of what they multiply, are largest.

      score_ij = |W_ij| |x_i|_2,    compared among the inputs i of one output j

    Args:
      taus: task tree, leaves [T, ...]: task vectors or stacked parameters.
      grams: X^T X of the layers' inputs, [T, ..., d, d], in the places of kernels; None
        or nothing elsewhere. See `mean_grams`; of experts of a mixture, weigh rows with
        what the router gives them.
      density: marked of the inputs of each output, exactly floor(density * n).
      pattern: (n, m), mark n of every m inputs in a row instead, as (2, 4).
      layout: of the kernels, "in_out" as Flax has them, "out_in" as PyTorch.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree of bools like `taus`; True in all of leaves without a Gram. Among equal
      scores the first inputs.

    Raises:
      ValueError: Grams that fit no kernel, a density outside of [0, 1], a pattern that
        does not divide the inputs, or NaN or infinity.

    Follows: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large
      Language Models"; with weighted rows Xie et al. 2024, "MoE-Pruner".

    >>> taus = {"w": jnp.array([[[1.0], [-3.0]]])}
    >>> grams = {"w": jnp.diag(jnp.array([16.0, 1.0]))[None]}
    >>> wanda_masks(taus, grams)["w"].tolist()
    [[[True], [False]]]
    """
    name = "wanda_masks"
    _compose.choice(name, "layout", layout, _spectral.LAYOUT)
    _compose.check_taus(name, taus, None, check_finite)
    found = _grams.views(name, taus, grams, layout, check_finite)
    _check_pattern(name, found, density, pattern)

    def leaf(path, x):
        if path not in found:
            return jnp.ones(x.shape, bool)
        gram, view = found[path]
        return _wanda(x, gram, view, layout, density, pattern)

    return tree.map_with_path(leaf, taus)


def sparse_gpt(
    taus: Any,
    grams: Any,
    *,
    density: float = 0.5,
    pattern: Pattern | None = None,
    block: int = 128,
    damping: float = 0.01,
    layout: _spectral.Layout = "in_out",
    check_finite: bool = True,
) -> Any:
    r"""Prunes linear layers and lets the weights that are left make up for it.

    With U^T U = (X^T X + damping mean(diag) I)^-1, U upper triangular, for one input i
    after another of W [out, in]:

      score_i = (w_i / U_ii)^2,   e = w_i / U_ii where the entry goes, else 0
      W <- W - e U_i              of the inputs i and after

    Args:
      taus: task tree, leaves [T, ...]: stacked parameters, or task vectors.
      grams: X^T X of the layers' inputs, see `wanda_masks`.
      density: kept of every block of inputs over all outputs, exactly
        floor(density * n).
      pattern: (n, m), keep n of every m inputs in a row of each output instead.
      block: inputs whose entries are chosen together.
      damping: added to the diagonal, as a share of its mean.
      layout: of the kernels, "in_out" as Flax has them, "out_in" as PyTorch.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree like `taus`; leaves without a Gram as they are. Weights of inputs that are
      always 0 become 0.

    Raises:
      ValueError: see `wanda_masks`; a block or damping that is not positive.

    Follows: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be
      Accurately Pruned in One-Shot", algorithm 1 with Bs = B, and its released code.
    Differs: counts are exact, where a threshold takes one entry more and all equal
      ones. U is the inverse of one triangular factor; the inverse is never formed.

    >>> taus = {"w": jnp.array([[[1.0], [3.0]]])}
    >>> grams = {"w": jnp.array([[[1.0, 1.0], [1.0, 1.0]]])}
    >>> sparse_gpt(taus, grams)["w"].round(1).tolist()
    [[[0.0], [4.0]]]
    """
    name = "sparse_gpt"
    _compose.choice(name, "layout", layout, _spectral.LAYOUT)
    _compose.check_taus(name, taus, None, check_finite)
    found = _grams.views(name, taus, grams, layout, check_finite)
    _check_pattern(name, found, density, pattern)
    damping = _compose.nonnegative(name, "damping", damping)
    if block < 1 or not damping:
        raise ValueError(
            f"{name}: block is {block} and damping {damping}, wanted both above 0"
        )
    if pattern:
        block = math.ceil(block / pattern[1]) * pattern[1]

    def leaf(path, x):
        if path not in found:
            return x
        gram, view = found[path]
        options = (view, layout, density, pattern, block)
        return _sparse_gpt(x, gram, jnp.float32(damping), *options)

    return tree.map_with_path(leaf, taus)


def _check_pattern(fn_name, found, density, pattern):
    share(fn_name, "density", density, 0)
    if pattern is None:
        return
    kept, group = pattern
    if not 0 <= kept <= group or group < 1:
        raise ValueError(f"{fn_name}: pattern is {pattern}, wanted n of m, n <= m")
    for leaf, (gram, _) in found.items():
        if gram.shape[-1] % group:
            raise ValueError(
                f"{fn_name}: {leaf!r} has {gram.shape[-1]} inputs, no multiple of the "
                f"{group} of pattern {pattern}"
            )


def _matrices(x, gram, view, layout):
    """Kernels [T, B, out, in], and Grams [T, B, in, in]."""
    y = _spectral.to_matrices(x, view, layout)
    return y, gram.astype(y.dtype).reshape(*y.shape[:2], *gram.shape[-2:])


def _back(y, like, layout):
    """[T, B, out, in] -> the shape of `like`, in the dtype of y."""
    y = jnp.swapaxes(y, -1, -2) if layout == "in_out" else y
    return y.reshape(like.shape)


def _group_mask(score, pattern):
    """The n largest of every m columns."""
    kept, group = pattern
    groups = score.reshape(*score.shape[:-1], -1, group)
    return tree.top_mask(groups, kept, rows=True).reshape(score.shape)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _wanda(x, gram, view, layout, density, pattern):
    y, gram = _matrices(x, gram, view, layout)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=-2, axis2=-1), 0))
    score = jnp.abs(y) * size[..., None, :]
    if pattern is None:
        count = share("wanda_masks", "density", density, y.shape[-1])
        mask = tree.top_mask(score, count, rows=True)
    else:
        mask = _group_mask(score, pattern)
    return _back(mask, x, layout)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _sparse_gpt(x, gram, damping, view, layout, density, pattern, block):
    y, gram = _matrices(x, gram, view, layout)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    dead = diagonal <= 0
    more = jnp.where(dead, 1, 0) + damping.astype(y.dtype) * jnp.where(
        dead, 1, diagonal
    ).mean(-1, keepdims=True)
    gram = gram + more[..., None] * _spectral.identity(gram)
    # From the last input on, the factor of the inverse is the inverse of the factor.
    turned = _spectral.inverse_factor(jnp.flip(gram, (-2, -1)))
    upper = jnp.flip(turned, (-2, -1))
    y = jnp.where(dead[..., None, :], 0, y)
    columns = y.shape[-1]
    block = min(block, columns)
    prune = functools.partial(_prune, density=density, pattern=pattern)
    whole = columns // block

    def turn(y, start):
        return prune(y, upper, start, block), None

    y, _ = jax.lax.scan(turn, y, block * jnp.arange(whole))
    if rest := columns - whole * block:
        y = prune(y, upper, jnp.int32(whole * block), rest)
    return _back(y, x, layout).astype(x.dtype)


def _prune(y, upper, start, size, *, density, pattern):
    """One block of columns of y [..., out, in], and its errors in those after it."""
    own = jax.lax.dynamic_slice_in_dim(y, start, size, -1)
    rows = jax.lax.dynamic_slice_in_dim(upper, start, size, -2)
    square = jax.lax.dynamic_slice_in_dim(rows, start, size, -1)
    diagonal = jnp.diagonal(square, axis1=-2, axis2=-1)[..., None, :]
    keep = jnp.ones(own.shape, bool)
    if pattern is None:
        score = (own / diagonal) ** 2
        flat = score.reshape(*score.shape[:-2], -1)
        count = share("sparse_gpt", "density", density, flat.shape[-1])
        keep = tree.top_mask(flat, count, rows=True).reshape(own.shape)

    def column(i, carry):
        own, keep, errors = carry
        if pattern is not None:
            keep = _ahead(own / diagonal, keep, i, pattern)
        value, pivot = own[..., i], diagonal[..., i]
        error = jnp.where(keep[..., i], 0, value / pivot)
        own = own - error[..., None] * square[..., i, None, :]
        # What goes is 0, not nearly 0.
        own = own.at[..., i].set(jnp.where(keep[..., i], value, 0))
        return own, keep, errors.at[..., i].set(error)

    start_of = (own, keep, jnp.zeros_like(own))
    own, _, errors = jax.lax.fori_loop(0, size, column, start_of)
    moved = y - _spectral.matmul(errors, rows)
    after = jnp.arange(y.shape[-1]) >= start + size
    moved = jnp.where(after[None, None, None, :], moved, y)
    return jax.lax.dynamic_update_slice_in_dim(moved, own, start, -1)


def _ahead(scaled, keep, i, pattern):
    """The mask, chosen anew for a group of columns where column i is its first."""
    group = pattern[1]
    first = i - i % group
    part = jax.lax.dynamic_slice_in_dim(scaled, first, group, -1)
    mask = _group_mask(part**2, pattern)
    new = jax.lax.dynamic_update_slice_in_dim(keep, mask, first, -1)
    return jnp.where(i == first, new, keep)
