"""Model Stock: how far to go towards the average, from the angles between tasks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _compose, _sphere
from mtl_jax.transforms.merging._rows import Axis


class _Ratio(NamedTuple):
    """Factors w_t * ratio of the angles; nothing else of a task enters."""

    clip: bool

    def __call__(self, x: jax.Array, weights: jax.Array, axes: Any) -> jax.Array:
        count = x.shape[0]
        found = _sphere.products(_sphere.units(x, axes)[0], axes)
        pairs = [found[s, t] for s in range(count) for t in range(s)]
        cosine = sum(pairs[1:], pairs[0]) / len(pairs)
        if self.clip:
            cosine = jnp.maximum(cosine, 0)
        below = 1 + (count - 1) * cosine
        usable = below > _sphere.TINY
        ratio = jnp.where(usable, count * cosine / jnp.where(usable, below, 1), 0)
        return weights * ratio[None]


def model_stock(
    taus: Any,
    *,
    weights: Any = None,
    key: Any = None,
    scope: _sphere.Scope = "leaf",
    axis: Axis = -1,
    clip: bool = True,
    check_finite: bool = True,
) -> Any:
    """Averages task vectors and shortens the average where they disagree.

      ratio = N c / (1 + (N - 1) c),   c the mean cosine over pairs of task vectors
      result = ratio * mean_t tau_t

    Args:
      taus: task tree of N tasks, leaves [T, ...].
      weights: [T] of the average, with a sum other than zero; ones by default.
      key: unused; every merge takes one.
      scope: "leaf", one ratio per leaf; "row", one per row.
      axis: along which axis of a parameter (the task axis not counted) rows run; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `taus`. Not read where the scope is "leaf".
      clip: a mean cosine below zero counts as zero, so that the ratio is in [0, 1];
        otherwise such leaves move away from all experts.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`; of one task that task.

    Raises:
      ValueError: the scope does not exist, a leaf lacks the axis or is complex, the
        weights do not fit, or something is NaN or infinite.

    Follows: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned
      models", the interpolation ratio for N models.
    Differs: with several models the angle is the mean of the pairwise cosines, as in
      mergekit; fusion_bench averages the angles. Both divide by zero where c is
      -1 / (N - 1): here that is clipped, and without `clip` the ratio is 0 there. A
      task that did not move has cosine 0. The paper has no weights.

    >>> taus = {"w": jnp.array([[1.0, 1.0], [1.0, 0.0]])}
    >>> [round(v, 3) for v in model_stock(taus)["w"].tolist()]
    [0.828, 0.414]
    """
    del key
    _, weights = _compose.check_taus("model_stock", taus, weights, check_finite)
    _compose.check_total("model_stock", weights)
    shares = weights / weights.sum()
    return _sphere.merge("model_stock", taus, shares, _Ratio(bool(clip)), scope, axis)
