"""MagMax: of every entry the largest change."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


@jax.jit
def _leaf(x: jax.Array, weights: jax.Array) -> jax.Array:
    wide = tree.wide_dtype(x.dtype)

    def larger(best, value):
        return jnp.where(jnp.abs(value) >= jnp.abs(best), value, best)

    values = [weights[t].astype(wide) * x[t].astype(wide) for t in range(x.shape[0])]
    return functools.reduce(larger, values).astype(x.dtype)


def magmax(
    taus: Any, *, weights: Any = None, key: Any = None, check_finite: bool = True
) -> Any:
    """Takes every entry from the task in which it changed most.

    result = w_s tau_s with s = argmax_t |w_t tau_t|, per entry

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T], ones by default; they enter the comparison.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: the weights do not fit, or something is NaN or infinite.

    Follows: Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless
      Continual Learning"; of equal magnitudes the last task's, as in the
      released code.
    Differs: the paper has no weights.

    >>> import jax.numpy as jnp
    >>> magmax({"w": jnp.array([[1.0, -3.0], [-2.0, 2.0]])})["w"].tolist()
    [-2.0, -3.0]
    """
    del key
    _, weights = _compose.check_taus("magmax", taus, weights, check_finite)
    return jax.tree.map(
        lambda x: _leaf(x, weights) if tree.is_inexact(x) else x[0], taus
    )
