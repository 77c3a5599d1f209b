"""NearSwap: take over what changed little, and no more than that of the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


@jax.jit
def _leaf(x: jax.Array, weights: jax.Array, threshold: jax.Array) -> jax.Array:
    wide = tree.wide_dtype(x.dtype)
    total = jnp.zeros(x.shape[1:], wide)
    for t in range(x.shape[0]):
        bound = threshold[t].astype(wide)
        total += weights[t].astype(wide) * jnp.clip(x[t].astype(wide), -bound, bound)
    return total.astype(x.dtype)


def nearswap(
    taus: Any,
    *,
    threshold: Any,
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Moves every entry to the expert, but not further than a threshold.

    result = sum_t w_t clip(tau_t, -threshold_t, threshold_t)

    Args:
      taus: task tree, leaves [T, ...].
      threshold: largest move of an entry, scalar or [T], not negative.
      weights: [T], ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: a threshold that is negative or does not fit, weights that do not
        fit, a complex leaf, or NaN or infinity.

    Follows: mergekit's `nearswap`: an interpolation to the other model by
      min(1, t / |tau|), which times tau is this clip.
    Differs: the interpolation clamps |tau| to 1e-6 from below, so that thresholds below
      1e-6 shrink smaller changes too; here they are taken over whole. Several experts
      are summed.

    >>> import jax.numpy as jnp
    >>> nearswap({"w": jnp.array([[4.0, -3.0, 0.5]])}, threshold=1.0)["w"].tolist()
    [1.0, -1.0, 0.5]
    """
    del key
    count, weights = _compose.check_taus("nearswap", taus, weights, check_finite)
    _compose.check_real("nearswap", taus)
    threshold = _compose.numbers("nearswap", "threshold", threshold)
    if threshold.shape not in ((), (count,)):
        raise ValueError(
            f"nearswap: threshold is {threshold.shape}, wanted a scalar or ({count},)"
        )
    _compose.check_nonnegative("nearswap", "threshold is", threshold)
    threshold = jnp.broadcast_to(threshold, (count,))
    return jax.tree.map(
        lambda x: _leaf(x, weights, threshold) if tree.is_inexact(x) else x[0], taus
    )
