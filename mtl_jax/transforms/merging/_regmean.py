"""RegMean: every linear layer by least squares on the inputs that it sees."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves, number
from mtl_jax._lapack import stacked
from mtl_jax.transforms.merging import _compose, _grams, _spectral
from mtl_jax.transforms.merging._grams import is_gram

Capture = Callable[[Any, Any], Any]


def mean_grams(capture_fn: Capture, params: Any, batches: Any) -> Any:
    r"""Mean over rows of the Gram matrices of layers' inputs, batch after batch.

      G = sum_b X_b^T X_b / sum_b rows_b

    Args:
      capture_fn: `capture_fn(params, batch)` -> a tree of `InputGram` in the places of
        the kernels of `params`; other places are None or missing. For Flax Linen it is
        `models.input_grams` of an apply function. Calls with the same function compile
        once.
      params: tree of parameters.
      batches: tree with leaves [S, ...], S batches.

    Returns:
      What `capture_fn` returns with Grams [..., d, d] float32 instead; zeros where no
      row was seen.

    Raises:
      ValueError: no batches, or a tree without an `InputGram`.

    >>> from mtl_jax.transforms.merging import InputGram
    >>> capture_fn = lambda w, x: {"w": InputGram(x.T @ x, jnp.float32(len(x)))}
    >>> mean_grams(capture_fn, None, jnp.array([[[3.0]], [[1.0]]]))["w"].tolist()
    [[5.0]]
    """
    tree.num_tasks("mean_grams: batches", batches)
    return _mean_grams(capture_fn, None, params, batches)


def regmean(
    taus: Any,
    grams: Any,
    *,
    alpha: float = 0.9,
    jitter: float = 0.0,
    weights: Any = None,
    key: Any = None,
    layout: _spectral.Layout = "in_out",
    check_finite: bool = True,
) -> Any:
    r"""Merges linear layers so that their outputs stay what they were for each task.

      minimise over W  sum_t w_t |X_t (W - W_t)|^2
      W = (sum_t w_t G_t)^-1 sum_t w_t G_t W_t

    with G_t = X_t^T X_t, all off its diagonal times alpha.

    Args:
      taus: task tree, leaves [T, ...]: task vectors or the stacked parameters
        themselves, for which the same holds.
      grams: tree of X_t^T X_t, [T, d, d], in the places of kernels [T, d, ...], or
        [T, L, d, d] for L scanned layers; None or nothing elsewhere, which becomes the
        weighted mean. `tree.stack` over tasks of `mean_grams` is one.
      alpha: share of what is off the diagonals that is kept, 0 to 1.
      jitter: pull to the weighted mean, as a share of the mean of the diagonal: what is
        seen little stays near it.
      weights: [T], ones by default, at least 0; they multiply the Grams.
      key: unused; every merge takes one.
      layout: of the kernels, "in_out" as Flax has them, "out_in" as PyTorch.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: Grams that fit no kernel, sums of Grams that are singular (under a
        trace the leaf becomes NaN), an option outside of its range, or NaN or infinity.

    Follows: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language
      Models", closed form and alpha.
    Differs: solved by Cholesky factors of the sum scaled to a unit diagonal, from the
      weighted mean on, so that equal models come back unchanged; inputs that are
      always 0 keep the mean, where the formula has no answer. Grams are means over
      rows with `mean_grams`, as in FusionBench; the paper's are sums.

    >>> taus = {"w": jnp.array([[[1.0], [1.0]], [[3.0], [3.0]]])}
    >>> grams = {"w": jnp.stack([jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2)])}
    >>> regmean(taus, grams)["w"].tolist()
    [[1.5], [2.0]]
    """
    del key
    name = "regmean"
    alpha, jitter = _options(name, alpha, jitter)
    _compose.choice(name, "layout", layout, _spectral.LAYOUT)
    _, weights = _compose.check_taus(name, taus, weights, check_finite)
    _compose.check_nonnegative(name, "weights are", weights)
    _compose.check_total(name, weights)
    found = _grams.views(name, taus, grams, layout, check_finite)
    flags = {}

    def merge(leaf, x):
        if leaf not in found:
            return tree.combine({leaf: x}, weights / weights.sum())[leaf]
        gram, view = found[leaf]
        merged, flags[leaf] = _solve(x, gram, weights, alpha, jitter, view, layout)
        return merged

    merged = tree.map_with_path(merge, taus)
    _refuse_singular(name, flags)
    return merged


def regmean_plus_plus(
    base: Any,
    taus: Any,
    capture_fn: Capture,
    batches: Sequence[Any],
    groups: Sequence[str],
    *,
    alpha: float = 0.9,
    jitter: float = 0.0,
    weights: Any = None,
    key: Any = None,
    layout: _spectral.Layout = "in_out",
    check_finite: bool = True,
) -> Any:
    r"""RegMean layer by layer, each on what comes out of the merged layers below.

    What no group names is averaged first. Then, for each group in turn, every task's
    batches run through a model that is merged up to there and the task's own from
    there on, the Grams of the group are taken, and the group is merged by `regmean`.

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...].
      capture_fn: as in `mean_grams`, on parameters like `base`.
      batches: T trees of batches with leaves [S, ...], one per task.
      groups: regular expressions, searched in names of leaves, in the order in which
        data passes: one per layer or block, such as `r"layers_0/"`. Layers that are
        scanned are one leaf, and one group, until they are unstacked.
      alpha: as in `regmean`.
      jitter: as in `regmean`.
      weights: as in `regmean`.
      key: unused; every merge takes one.
      layout: as in `regmean`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`, to be added to the base. Each
      group compiles once; Grams of other groups are not computed.

    Raises:
      ValueError: as `regmean`; or a leaf in two groups, a group without leaves, or not
        one set of batches per task.

    Follows: "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean
      for Model Merging" (arXiv 2508.03121), as in FusionBench: inside of a layer the
      inputs are those of the task's own layer.

    >>> from mtl_jax.transforms.merging import InputGram
    >>> base, taus = {"w": jnp.zeros((1, 1))}, {"w": jnp.array([[[1.0]], [[4.0]]])}
    >>> capture_fn = lambda p, x: {"w": InputGram(x.T @ x, jnp.float32(len(x)))}
    >>> batches = [jnp.ones((1, 1, 1)), jnp.sqrt(jnp.full((1, 1, 1), 3.0))]
    >>> regmean_plus_plus(base, taus, capture_fn, batches, ["w"])["w"].round(2).tolist()
    [[3.25]]
    """
    del key
    name = "regmean_plus_plus"
    count, weights = _compose.check_taus(name, taus, weights, check_finite)
    _compose.check_nonnegative(name, "weights are", weights)
    _compose.check_total(name, weights)
    batches = list(batches)
    for own in batches:
        tree.num_tasks(f"{name}: batches", own)
    if len(batches) != count:
        raise ValueError(f"{name}: {len(batches)} sets of batches, {count} tasks")
    named = named_leaves(taus)
    place = _places(name, taus, groups)
    done = {
        leaf: tree.combine({leaf: x}, weights / weights.sum())[leaf]
        for leaf, x in named.items()
        if leaf not in place
    }
    options = {"alpha": alpha, "jitter": jitter, "weights": weights, "layout": layout}
    for turn in range(len(groups)):
        leaves = tuple(leaf for leaf, at in place.items() if at == turn)
        part = {leaf: named[leaf] for leaf in leaves}
        found = [
            named_leaves(_mean_grams(capture_fn, leaves, model, own))
            for model, own in zip(_partly(base, taus, done), batches, strict=True)
        ]
        if found[0]:
            grams = {k: jnp.stack([g[k] for g in found]) for k in found[0]}
            try:
                merged = regmean(part, grams, check_finite=check_finite, **options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        else:
            merged = tree.combine(part, weights / weights.sum())
        done |= merged
    return tree.map_with_path(lambda leaf, _: done[leaf], taus)


def _options(name, alpha, jitter):
    alpha = number(name, "alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: alpha is {alpha}, wanted 0 <= alpha <= 1")
    jitter = _compose.nonnegative(name, "jitter", jitter)
    return jnp.float32(alpha), jnp.float32(jitter)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_grams(capture_fn, wanted, params, batches):
    """`mean_grams` of the leaves that are wanted; None for all."""

    def capture(batch):
        found = capture_fn(params, batch)
        grams = jax.tree.leaves(found, is_leaf=is_gram)
        if not grams or not all(map(is_gram, grams)):
            raise ValueError("mean_grams: capture_fn returns no tree of InputGram")
        if wanted is None:
            return found
        seen = jax.tree_util.tree_flatten_with_path(found, is_leaf=is_gram)[0]
        named = {tree.path_str(path): gram for path, gram in seen}
        return {leaf: gram for leaf, gram in named.items() if leaf in wanted}

    def turn(total, batch):
        found = capture(batch)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, found), None

    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(capture, jax.tree.map(lambda x: x[0], batches)),
    )
    return jax.tree.map(
        lambda g: g.total / jnp.maximum(g.rows, 1)[..., None, None],
        jax.lax.scan(turn, start, batches)[0],
        is_leaf=is_gram,
    )


@functools.partial(jax.jit, static_argnums=(5, 6))
def _solve(x, gram, weights, alpha, jitter, view, layout):
    turned = "out_in" if layout == "in_out" else "in_out"  # Inputs are rows here.
    y = _spectral.to_matrices(x, view, turned)
    wide, side = y.dtype, gram.shape[-1]
    weights, alpha, jitter = (v.astype(wide) for v in (weights, alpha, jitter))
    eye = jnp.eye(side, dtype=wide)[None, None]
    gram = gram.astype(wide).reshape(*y.shape[:2], side, side)
    gram = gram * weights[:, None, None, None] * (alpha + (1 - alpha) * eye)
    share = (weights / weights.sum())[:, None, None, None]
    mean = (share * y).sum(0)
    target = _spectral.matmul(gram, y - mean[None]).sum(0)
    total = gram.sum(0)
    diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
    more = jitter * diagonal.mean(-1, keepdims=True)
    seen = diagonal > 0
    roots = jnp.where(seen, jax.lax.rsqrt(jnp.where(seen, diagonal + more, 1)), 0)
    scaled = total * roots[..., None] * roots[..., None, :]
    scaled = jnp.where(eye[0] > 0, 1, scaled)
    factor = stacked(jnp.linalg.cholesky, scaled)
    least = jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1)).min(-1)
    fits = (least > side * jnp.finfo(wide).eps) & (diagonal >= 0).all(-1)
    moved = stacked(_solved, factor, target * roots[..., None])
    merged = jnp.where(fits[..., None, None], mean + moved * roots[..., None], jnp.nan)
    return _spectral.from_matrices(merged, x, turned), fits.all()


def _solved(factor, target):
    return jax.scipy.linalg.cho_solve((factor, True), target)


def _refuse_singular(name, flags):
    if any(isinstance(flag, jax.core.Tracer) for flag in flags.values()):
        return
    bad = [leaf for leaf, fits in jax.device_get(flags).items() if not fits]
    if bad:
        more = f" (and {len(bad) - 1} more leaves)" if len(bad) > 1 else ""
        raise ValueError(
            f"{name}: the sum of the Grams of {bad[0]!r} is not positive definite"
            f"{more}; give more inputs, an alpha below 1 or a jitter"
        )


def _places(name, taus, groups) -> dict[str, int]:
    """Leaf -> index of the group that it is in."""
    place: dict[str, int] = {}
    for turn, pattern in enumerate(groups):
        try:
            chosen = named_leaves(tree.select(taus, pattern))
        except ValueError as error:
            raise ValueError(f"{name}: groups: {error}") from error
        for leaf, inside in chosen.items():
            if inside and leaf in place:
                raise ValueError(
                    f"{name}: {leaf!r} is in {groups[place[leaf]]!r} and {pattern!r}"
                )
            if inside:
                place[leaf] = turn
    return place


def _partly(base, taus, done):
    """Each task's model, with the leaves merged that are done."""
    for t in range(jax.tree.leaves(taus)[0].shape[0]):
        delta = tree.map_with_path(
            lambda leaf, x, t=t: done[leaf] if leaf in done else x[t], taus
        )
        yield tree.add_scaled(base, delta)
