"""RAM: average what several tasks changed, keep whole what one task changed."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def _changed(x: jax.Array, epsilon: jax.Array):
    """Per task the values, whether they count, and how many tasks do at each entry."""
    wide = tree.wide_dtype(x.dtype)
    values = [x[t].astype(wide) for t in range(x.shape[0])]
    moved = [jnp.abs(v) > epsilon.astype(wide) for v in values]
    return values, moved, functools.reduce(jnp.add, [m.astype(wide) for m in moved])


@jax.jit
def _shared_and_unique(x: jax.Array, epsilon: jax.Array) -> jax.Array:
    """[2, T] float32: how many entries of each task others change too, and no other."""
    _, moved, count = _changed(x, epsilon)

    def number(mask):
        return jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32)

    shared = jnp.stack([number(m & (count > 1)) for m in moved])
    return jnp.stack([shared, jnp.stack([number(m & (count == 1)) for m in moved])])


@jax.jit
def _leaf(x: jax.Array, weights: jax.Array, boost: jax.Array, epsilon: jax.Array):
    values, moved, count = _changed(x, epsilon)
    total = jnp.zeros_like(values[0])
    for t, (value, keep) in enumerate(zip(values, moved, strict=True)):
        factor = jnp.where(count == 1, boost[t].astype(value.dtype), 1)
        scaled = weights[t].astype(value.dtype) * factor * value
        total += jnp.where(keep, scaled, 0)
    return (total / jnp.maximum(count, 1)).astype(x.dtype)


def ram(
    taus: Any,
    *,
    epsilon: float = 1e-5,
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """Averages each entry over the tasks that changed it.

    result = sum_{t in A} w_t tau_t / |A|,   A = {t : |tau_t| > epsilon} per entry

    Args:
      taus: task tree, leaves [T, ...].
      epsilon: magnitude up to which an entry counts as unchanged.
      weights: [T], multiply the values; ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: a negative epsilon, weights that do not fit, or NaN or infinity.

    Follows: "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, RAM:
      what one task changed is kept, what several changed is averaged.
    Differs: the paper has no weights.

    >>> ram({"w": jnp.array([[2.0, 0.0, 3.0], [4.0, 1.0, 0.0]])})["w"].tolist()
    [3.0, 1.0, 3.0]
    """
    del key
    count, weights = _check("ram", taus, epsilon, weights, check_finite)
    return _merge(taus, weights, [jnp.ones(count)] * _size(taus), epsilon)


def ram_plus(
    taus: Any,
    *,
    gain: float = 0.1,
    limit: float = 0.2,
    epsilon: float = 1e-5,
    scope: Literal["global", "leaf"] = "global",
    weights: Any = None,
    key: Any = None,
    check_finite: bool = True,
) -> Any:
    """RAM that amplifies what one task alone changed, the more of it is shared.

      b_t = 1 + gain * clip(shared_t / unique_t, 0, limit)
      result = w_t b_t tau_t where t alone changed the entry, as in `ram` elsewhere

    with shared_t and unique_t the numbers of entries of task t that other tasks changed
    too, and that none did.

    Args:
      taus: task tree, leaves [T, ...].
      gain: the paper's r.
      limit: the paper's alpha, bound of the ratio.
      epsilon: as in `ram`.
      scope: "global", one ratio per task; "leaf", one per task and leaf.
      weights: as in `ram`.
      key: unused; every merge takes one.
      check_finite: as in `ram`.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: as in `ram`; an option that is negative or does not exist.

    Follows: "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, RAM+.
    Differs: mergekit's `ramplus_tl` is `scope="leaf"`.

    >>> taus = {"w": jnp.array([[2.0, 0.0, 3.0], [4.0, 1.0, 0.0]])}
    >>> [round(v, 2) for v in ram_plus(taus, gain=0.5, limit=1.0)["w"].tolist()]
    [3.0, 1.5, 4.5]
    """
    del key
    count, weights = _check("ram_plus", taus, epsilon, weights, check_finite)
    gain = _compose.nonnegative("ram_plus", "gain", gain)
    limit = _compose.nonnegative("ram_plus", "limit", limit)
    _compose.choice("ram_plus", "scope", scope, ("global", "leaf"))
    counts = [
        _shared_and_unique(x, jnp.float32(epsilon))
        if tree.is_inexact(x)
        else jnp.zeros((2, count))
        for x in jax.tree.leaves(taus)
    ]
    if scope == "global":
        counts = [functools.reduce(jnp.add, counts)] * len(counts)

    def boost(shared, unique):
        # Without unique entries there is nothing to amplify.
        return 1 + gain * jnp.clip(shared / jnp.maximum(unique, 1), 0, limit)

    return _merge(taus, weights, [boost(*c) for c in counts], epsilon)


def _size(taus: Any) -> int:
    return len(jax.tree.leaves(taus))


def _check(fn_name: str, taus: Any, epsilon: Any, weights: Any, check_finite: bool):
    found = _compose.check_taus(fn_name, taus, weights, check_finite)
    _compose.nonnegative(fn_name, "epsilon", epsilon)
    return found


def _merge(taus: Any, weights: jax.Array, boosts: list[jax.Array], epsilon: float):
    leaves, treedef = jax.tree.flatten(taus)
    return treedef.unflatten(
        [
            _leaf(x, weights, b, jnp.float32(epsilon)) if tree.is_inexact(x) else x[0]
            for x, b in zip(leaves, boosts, strict=True)
        ]
    )
