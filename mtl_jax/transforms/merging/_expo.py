"""ExPO: go on in the direction that alignment took."""

from typing import Any

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def expo(
    taus: Any,
    *,
    strength: float,
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Extrapolates from a weaker model through a stronger one.

    result = (1 + strength) sum_t w_t tau_t / sum_t w_t

    Args:
      taus: what alignment changed in the supervised model, leaves [T, ...]; with
        several aligned models their average is extrapolated.
      strength: how far beyond the stronger model, in lengths of the step to it; 0 is
        the stronger model itself.
      weights: [T] with a sum other than zero, ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`, a delta on the weaker model.

    Raises:
      ValueError: the strength is not a number, the weights do not fit, or something
        is NaN or infinite.

    Follows: Zheng et al. 2024, "Weak-to-Strong Extrapolation Expedites Alignment".
    Differs: nothing; the base here is the weaker (SFT) model.

    >>> import jax.numpy as jnp
    >>> expo({"w": jnp.array([[1.0, -2.0]])}, strength=0.5)["w"].tolist()
    [1.5, -3.0]
    """
    del key
    _, weights = _compose.check_taus("expo", taus, weights, check_finite)
    _compose.check_total("expo", weights)
    strength = _compose.number("expo", "strength", strength)
    return tree.combine(taus, (1 + strength) * weights / weights.sum())
