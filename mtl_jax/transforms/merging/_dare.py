"""DARE: drop at random, rescale the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _compose


def dare(
    taus: Any,
    *,
    density: float,
    key: jax.Array,
    weights: Any = None,
    rescale: bool = True,
    elect: _compose.Elect = "none",
    reduce: _compose.Reduce = "sum",
    check_finite: bool = True,
) -> Any:
    """Merges task vectors thinned at random, unbiased.

    v_t = b_t tau_t / density, with b_t independent Bernoulli(density) per entry

    Args:
      taus: task tree, leaves [T, ...].
      density: probability of keeping an entry, in (0, 1].
      key: typed PRNG key.
      weights: [T], ones by default; for the "mean" with a sum other than zero.
      rescale: divide by the density, so that the expectation is the task vector.
      elect: "none" adds the thinned vectors; "sum" or "count" elect signs as in `ties`.
      reduce: "sum", "mean" or "disjoint_mean", as in `ties`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: the density is not in (0, 1], an option does not exist, the weights
        do not fit, or something is NaN or infinite.

    Follows: Yu et al. 2024, "Language Models are Super Mario", section 3.
    Differs: the factor is 1 / density as in the paper; mergekit rescales to the L1 norm
      of the original.

    >>> taus = {"w": jnp.ones((1, 4))}
    >>> dare(taus, density=1.0, key=jax.random.key(0))["w"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    count, weights = _compose.check_taus("dare", taus, weights, check_finite)
    density = _compose.number("dare", "density", density)
    _compose.check_key("dare", key)
    _compose.choice("dare", "elect", elect, _compose.ELECT)
    _compose.choice("dare", "reduce", reduce, _compose.REDUCE)
    if reduce == "mean":
        _compose.check_total("dare", weights)
    if not 0 < density <= 1:
        raise ValueError(f"dare: density is {density}, wanted 0 < density <= 1")
    factor = jnp.full(count, 1 / density if rescale else 1.0, jnp.float32)
    share = jnp.full(count, density, jnp.float32)
    selectors = [
        _compose.Coin(keys, share, factor)
        for keys in _compose.leaf_keys(key, taus, count)
    ]
    return _compose.merge(taus, selectors, weights, elect=elect, reduce=reduce)
