"""SCE: select where tasks differ, weigh by what they changed, erase the minority."""

import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def _values(x: jax.Array) -> list[jax.Array]:
    wide = tree.wide_dtype(x.dtype)
    return [x[t].astype(wide) for t in range(x.shape[0])]


@jax.jit
def _variance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Variance over tasks, exactly zero where they are equal, and how many are not."""
    values = _values(x)
    mean = functools.reduce(jnp.add, values) / len(values)
    square = functools.reduce(jnp.add, [jnp.square(v - mean) for v in values])
    equal = functools.reduce(jnp.logical_and, [v == values[0] for v in values])
    variance = jnp.where(equal, 0, square / len(values)).astype(jnp.float32)
    count = jnp.sum(variance > 0, dtype=jnp.uint32)
    return tree.settled(variance), count


@functools.partial(jax.jit, static_argnums=(1, 2))
def _portion(count: jax.Array, numerator: int, denominator: int) -> jax.Array:
    """floor(count * numerator / denominator) in 32 bits, by long division."""

    def digit(i, carry):
        quotient, rest = carry
        bit = (count >> (31 - i).astype(jnp.uint32)) & jnp.uint32(1)
        rest = 2 * rest + bit * jnp.uint32(numerator)
        divisor = jnp.uint32(denominator)
        return 2 * quotient + rest // divisor, rest % divisor

    zero = jnp.zeros_like(count)
    return jax.lax.fori_loop(0, 32, digit, (zero, zero))[0]


def _chosen(x: jax.Array, density: float) -> jax.Array | None:
    """Mask of the entries of largest variance; None for all of them."""
    if density == 1 or x.shape[0] == 1:
        return None
    variance, count = _variance(x)
    part = Fraction(repr(density)).limit_denominator(10**9)
    kept = _portion(count, part.numerator, part.denominator)
    cutoff = tree.top_cutoff(variance, kept, zero_ties=False)
    return tree.reaches(variance, cutoff) & (variance > 0)


@jax.jit
def _leaf(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array, floor: jax.Array
) -> jax.Array:
    values = _values(x)
    if mask is not None:
        values = [jnp.where(mask, v, 0) for v in values]
    wide = values[0].dtype
    squares = jnp.stack([jnp.mean(jnp.square(v)) for v in values])
    total = jnp.sum(squares)
    level = total <= floor.astype(wide)
    shares = jnp.where(level, 1 / len(values), squares / jnp.where(level, 1, total))
    shares = shares * weights.astype(wide)
    sign = jnp.sign(functools.reduce(jnp.add, values))
    above, below = jnp.zeros_like(sign), jnp.zeros_like(sign)
    for share, value in zip(shares, values, strict=True):
        agrees = value * sign > 0
        above += jnp.where(agrees, share * value, 0)
        below += jnp.where(agrees, share, 0)
    merged = jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
    return merged.astype(x.dtype)


def sce(
    taus: Any,
    *,
    density: float = 1.0,
    floor: float = 0.0,
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Selects the entries in which tasks differ, weighs tasks by size, elects signs.

      S = the largest of Var_t tau_t, a share of those that are not zero
      c_t = w_t sum_S tau_t^2 / sum_s sum_S tau_s^2
      result = sum_{t in A} c_t tau_t / sum_{t in A} c_t on S, 0 elsewhere
      A = {t : sign(tau_t) = sign(sum_s tau_s)} per entry

    Every leaf by itself.

    Args:
      taus: task tree, leaves [T, ...].
      density: fraction kept of the entries of a leaf in which the tasks differ. At 1
        also those in which they agree are kept, and of one task everything is.
      floor: where the mean squares of the tasks sum to this or less, tasks weigh the
        same.
      weights: [T], positive, multiply the weights; ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: a density outside [0, 1], a negative floor, weights that do not fit,
        a complex leaf, or NaN or infinity.

    Follows: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", SCE.
    Differs: mergekit lets tasks weigh the same where the mean squares sum to less than
      1e-6, as those of changes below 1e-4 do; `floor=1e-6` is that. There a sum of
      zero counts as positive, here nothing passes. Counts are exact, with the first
      among equal variances.

    >>> taus = {"w": jnp.array([[3.0, 1.0, 1.0], [1.0, 1.0, -1.0]])}
    >>> [round(v, 3) for v in sce(taus, density=0.5)["w"].tolist()]
    [2.8, 0.0, 0.0]
    """
    del key
    _, weights = _compose.check_taus("sce", taus, weights, check_finite)
    _compose.check_real("sce", taus)
    _compose.check_positive("sce", weights)
    _compose.share("sce", "density", density, 1)
    floor = jnp.float32(_compose.nonnegative("sce", "floor", floor))
    return jax.tree.map(
        lambda x: (
            _leaf(x, _chosen(x, float(density)), weights, floor)
            if tree.is_inexact(x) and x.size
            else x[0]
        ),
        taus,
    )
