"""DELLA: drop at random, small changes more often, and rescale the rest."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._rows import Axis, row_axes

Rescale = Literal["probability", "l1", "none"]
RESCALE = ("probability", "l1", "none")


def _ranks(rows: jax.Array) -> jax.Array:
    """Ranks of |rows| along the last axis, 0 for the smallest; first among equals.

    Half of the bits of a magnitude and a place fit in 32 bits, and sorting such
    integers is several times faster on CPUs than sorting floats that carry their places
    along. So places are sorted by the low half, then by the high half, then back.
    """
    length = rows.shape[-1]
    if length > 1 << 16 or rows.dtype.itemsize > 4:
        return jnp.argsort(jnp.argsort(jnp.abs(rows), stable=True), stable=True)
    bits = tree.magnitude_bits(rows)
    place = jax.lax.broadcasted_iota(jnp.uint32, rows.shape, rows.ndim - 1)
    low = jnp.uint32(0xFFFF)

    def order(key):
        """Places of a key of 16 bits, ascending and stable."""
        return jax.lax.sort((key << 16) | place) & low

    first = order(bits & low)
    then = order(jnp.take_along_axis(bits, first, -1) >> 16)
    return order(jnp.take_along_axis(first, then, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RankCoin:
    """Keeps entries with a probability that grows with their rank in the row."""

    key: jax.Array
    low: jax.Array
    high: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})
    rescale: Rescale = dataclasses.field(metadata={"static": True})

    def probabilities(self, rows: jax.Array) -> jax.Array:
        """rows: [..., n], ranked along the last axis."""
        length = rows.shape[-1]
        rank = _ranks(rows)
        # A row of one entry has no order: it is kept as often as entries on average.
        share = rank.astype(rows.dtype) / (length - 1) if length > 1 else 0.5
        low, high = self.low.astype(rows.dtype), self.high.astype(rows.dtype)
        return jnp.broadcast_to(low + share * (high - low), rows.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [...] -> x rescaled where kept, 0 elsewhere."""
        rows = jnp.moveaxis(x, self.axis, -1) if x.ndim else x[None]
        chance = self.probabilities(rows)
        kept = jax.random.bernoulli(self.key, chance)
        values = jnp.where(kept, rows, 0)
        if self.rescale == "probability":
            values = values / chance
        elif self.rescale == "l1":
            left = jnp.sum(jnp.abs(values))
            ratio = jnp.sum(jnp.abs(rows)) / jnp.where(left > 0, left, 1)
            values = values * ratio
        return jnp.moveaxis(values, -1, self.axis) if x.ndim else values[0]


def della(
    taus: Any,
    *,
    density: float,
    key: jax.Array,
    spread: float = 0.15,
    weights: Any = None,
    axis: Axis = -1,
    rescale: Rescale = "probability",
    elect: _compose.Elect = "sum",
    reduce: _compose.Reduce = "disjoint_mean",
    check_finite: bool = True,
) -> Any:
    """Merges task vectors thinned at random, large changes kept more often.

      p = density - spread + 2 spread rank / (n - 1)
      v = b tau / p with b independent Bernoulli(p) per entry

    with the rank of |tau| in its row of n entries, 0 for the smallest. Then signs are
    elected and the rest is reduced as in `ties`.

    Args:
      taus: task tree, leaves [T, ...].
      density: mean probability of keeping an entry.
      key: typed PRNG key.
      spread: half the range of the probabilities, mergekit's epsilon and half the
        paper's; 0 is `dare`.
      weights: [T], ones by default; positive where signs are elected, for the "mean"
        with a sum other than zero.
      axis: along which axis of a parameter (the task axis not counted) rows run; an
        integer, a function of the leaf's path such as `unit_axis`, or a tree of
        integers like `taus`.
      rescale: "probability" divides by p, so that the expectation is the task vector;
        "l1" restores the sum of magnitudes of the leaf; "none" does neither.
      elect: "sum", "count" or "none", as in `ties`.
      reduce: "disjoint_mean", "sum" or "mean", as in `ties`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: probabilities that leave (0, 1], an option that does not exist, an
        axis that a leaf lacks, weights that do not fit, or NaN or infinity.

    Follows: Deep et al. 2024, "DELLA-Merging: Reducing Interference in Model Merging
      through Magnitude-Based Sampling": MagPrune, elect, fuse.
    Differs: mergekit rescales by `rescale="l1"`; its `della_linear` is `elect="none"`
      with `reduce="sum"`. Rows of one entry, for which (n - 1) is zero, are kept with
      probability `density`; mergekit raises there.

    >>> taus = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> della(taus, density=1.0, spread=0.0, key=jax.random.key(0))["w"].tolist()
    [4.0, -3.0, 2.0, 1.0]
    """
    count, weights = _compose.check_taus("della", taus, weights, check_finite)
    _compose.check_real("della", taus)
    density = _compose.number("della", "density", density)
    spread = _compose.nonnegative("della", "spread", spread)
    if not (density - spread > 0 and density + spread <= 1):
        raise ValueError(
            f"della: density is {density} and spread {spread}, wanted "
            "0 < density - spread and density + spread <= 1"
        )
    _compose.check_key("della", key)
    _compose.choice("della", "rescale", rescale, RESCALE)
    _compose.choice("della", "elect", elect, _compose.ELECT)
    _compose.choice("della", "reduce", reduce, _compose.REDUCE)
    if elect != "none":
        _compose.check_positive("della", weights)
    elif reduce != "sum":
        _compose.check_total("della", weights)
    low = jnp.full(count, density - spread, jnp.float32)
    high = jnp.full(count, density + spread, jnp.float32)
    selectors = [
        _RankCoin(keys, low, high, a, rescale)
        for keys, a in zip(
            _compose.leaf_keys(key, taus, count),
            row_axes("della", axis, taus),
            strict=True,
        )
    ]
    return _compose.merge(taus, selectors, weights, elect=elect, reduce=reduce)
