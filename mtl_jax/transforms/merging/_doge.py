"""DOGE: task vectors moved so that their sum looks like each of them."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree
from mtl_jax._checks import named_leaves, number
from mtl_jax._strides import as_rows
from mtl_jax.transforms.merging import _compose, _learning, _spectral


def doge(
    taus: Any,
    *,
    density: float = 0.3,
    scale: float = 0.07,
    subspace: int = 6,
    steps: int = 400,
    learning_rate: float = 1e-4,
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    layout: _spectral.Layout = "in_out",
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Learns one shift of all task matrices, off what they share, and adds them up.

      minimise over D  sum_t sum_o <tau_t[o], tau_t[o] - sum_k l_k (tau_k + D)[o]>^2
      result = sum_t l_t mask_t (tau_t + D),   l_t = w_t scale / |tau_t|

    for rows o of outputs, by Adam on the gradient less its part in the shared subspace:
    the leading k // subspace left singular vectors of the tasks' leading k // T ones
    side by side, k = min(m, n). mask_t keeps the largest entries of tau_t.

    Args:
      taus: task tree, leaves [T, ...].
      density: share of each task's entries that is kept, over all matrices.
      scale: norm of a task's part of a matrix before the shift and the mask, the
        paper's eta. The result is the delta itself: no further scale belongs to it.
      subspace: which part of the k directions is shared; larger protects fewer.
      steps: of Adam.
      learning_rate: of Adam, in units of the parameters.
      weights: [T], ones by default; they multiply l_t.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become zeros:
        they stay what they are in the base.
      layout: of the matrices, "in_out" as Flax has kernels, "out_in" as PyTorch.
      svd: how singular vectors are found; see `tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option outside of its range, weights that do not fit, no matrix, or
        NaN or infinity.

    Follows: Wei et al. 2025, "Modeling Multi-Task Model Merging as Adaptive Projective
      Gradient Descent", DOGE for task arithmetic, with the loss per row, the projection
      before Adam and the defaults of FusionBench.
    Differs: the loss is differentiated by hand; a task that is zero in a matrix has no
      part there, where the formula divides by zero. Ties at the cut of the mask are
      broken by position, where the released code keeps all of them.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])}
    >>> doge(taus, scale=0.5, density=0.25, steps=0)["w"].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    del key
    name = "doge"
    _compose.choice(name, "svd", svd, _spectral.TOP_SVD)
    _compose.choice(name, "layout", layout, _spectral.LAYOUT)
    rate, scale = (
        number(name, k, v)
        for k, v in (("learning_rate", learning_rate), ("scale", scale))
    )
    steps, subspace = operator.index(steps), operator.index(subspace)
    if steps < 0 or subspace < 1 or not rate > 0:
        raise ValueError(
            f"{name}: steps is {steps}, subspace {subspace} and learning_rate {rate}, "
            "wanted steps >= 0, subspace >= 1 and a positive rate"
        )
    _, weights = _compose.check_taus(name, taus, weights, check_finite)
    views, named = _spectral.views(name, taus, matrices), named_leaves(taus)
    if not views:
        raise ValueError(f"{name}: no leaf of taus is a matrix")
    chosen = {leaf: named[leaf] for leaf in views}
    bands = _compose.top_share(name, chosen, density, "global")
    band = dict(zip(tree.paths(chosen), bands, strict=True))

    def leaf(path, x):
        if path not in views:
            return jnp.zeros_like(x[0])
        options = views[path], layout, steps, rate, subspace, svd
        return _merge(x, band[path], scale * weights, *options)

    return tree.map_with_path(leaf, taus)


@functools.partial(jax.jit, static_argnums=tuple(range(3, 9)))
def _merge(x, band, weights, view, layout, steps, rate, subspace, svd):
    y = _spectral.to_matrices(x, view, layout)
    norms = jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
    factors = weights.astype(y.dtype)[:, None, None, None] * _spectral.inverse(norms)
    shared = _shared(y, subspace, svd)
    shift = _shift(y, factors, shared, steps, rate)
    moved = y + shift[None]
    kept = [
        jax.tree.map(lambda a, t=t: a[t], band).mask(row) for t, row in enumerate(x)
    ]
    masks = _spectral.to_matrices(
        jnp.stack(kept).astype(jnp.float32), view, layout
    ).astype(y.dtype)
    return _spectral.from_matrices((factors * masks * moved).sum(0), x, layout)


def _shared(y, subspace, svd):
    """[B, m, r]: orthonormal directions of outputs in which the tasks meet."""
    side = min(y.shape[-2:])
    if not side // y.shape[0] or not side // subspace:
        return y[0, ..., :0]
    own = _spectral.svd(y, side // y.shape[0], svd)[0]
    together = jnp.concatenate(list(own), -1)
    rank = min(side // subspace, together.shape[-1])
    return _spectral.svd(together, rank)[0]


def _shift(y, factors, shared, steps, rate):
    """The learned shift [B, m, n]."""
    total = factors.sum(0)
    start = (factors * y).sum(0)
    # <tau_t[o], tau_t[o] - sum_k l_k tau_k[o]>: what is left of it moves with D alone.
    gaps = (y * (y - start[None])).sum(-1)
    gaps = jnp.moveaxis(gaps, 0, -1)[..., None]
    # All tasks' rows of one output side by side: their products are quicker than sums.
    rows = as_rows(jnp.moveaxis(y, 0, -2))
    optimizer = optax.adam(rate)

    def step(carry, _):
        shift, state = carry
        rests = gaps - total[..., None] * _spectral.matmul(rows, shift[..., None])
        slope = _spectral.matmul(_spectral.transpose(rests), rows)[..., 0, :]
        slope = -2 * total * slope
        inside = _spectral.matmul(_spectral.transpose(shared), slope)
        rest = slope - _spectral.matmul(shared, inside)
        # Adam would make steps of rounding, where nothing else is left.
        least = 8 * jnp.finfo(rest.dtype).eps * jnp.linalg.norm(slope, axis=-2)
        slope = jnp.where(jnp.abs(rest) > least[..., None, :], rest, 0)
        return _learning.descend(optimizer, slope, state, shift), None

    shift = jnp.zeros_like(start)
    carry = shift, optimizer.init(shift)
    return jax.lax.scan(step, carry, length=steps)[0][0]
