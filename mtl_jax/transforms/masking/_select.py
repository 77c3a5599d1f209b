"""Masks of an exact density: the largest entries, or random ones."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax._checks import share

_SCOPES = ("leaf", "row", "global")


def density(mask: chex.ArrayTree) -> chex.Array:
    """Fraction of entries that a mask keeps.

    Args:
      mask: tree of bool arrays, any shapes.

    Returns:
      float32 scalar; exact counts, one rounding per leaf.

    Raises:
      ValueError: if a leaf is not a bool array, or there are no entries.

    >>> density({"a": jnp.array([True, False]), "b": jnp.array([True, True])})
    Array(0.75, dtype=float32)
    """
    total = 0
    for name, leaf in zip(tree.paths(mask), jax.tree.leaves(mask), strict=True):
        if not isinstance(leaf, (jax.Array, np.ndarray)) or leaf.dtype != bool:
            raise ValueError(
                f"density: {name!r} is {getattr(leaf, 'dtype', type(leaf).__name__)}, "
                "wanted an array of bool (a Python bool says nothing of its size)"
            )
        total += leaf.size
    if not total:
        raise ValueError("density: the mask has no entries")
    return sum(
        jnp.sum(jnp.asarray(leaf), dtype=jnp.uint32).astype(jnp.float32) / total
        for leaf in jax.tree.leaves(mask)
    ) + jnp.zeros((), jnp.float32)


def _check(name: str, tree_: Any, fraction: float, scope: str) -> None:
    share(name, "density", fraction, 0)
    if scope not in _SCOPES:
        raise ValueError(
            f"{name}: scope {scope!r} does not exist; wanted one of "
            f"{', '.join(map(repr, _SCOPES))}"
        )
    for path, leaf in zip(tree.paths(tree_), jax.tree.leaves(tree_), strict=True):
        if not tree.is_inexact(leaf):
            raise ValueError(
                f"{name}: {path!r} is {jnp.result_type(leaf)}, wanted a float"
            )


def magnitude(
    tree_: chex.ArrayTree,
    density: float,
    scope: str = "leaf",
    *,
    check_finite: bool = True,
) -> chex.ArrayTree:
    """Keeps the entries of largest magnitude, exactly floor(density * n) of them.

    Args:
      tree_: tree of float leaves [...] of at most 32 bits.
      density: fraction kept, in [0, 1]; static.
      scope: what n counts: "leaf" each leaf, "row" each row (last axis) of each leaf,
        "global" the whole tree as one vector.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree of bool like `tree_`; among equal magnitudes the first by leaf order and
      index.

    Raises:
      ValueError: if the density, the scope or a leaf is wrong, or, on concrete
        arrays, a leaf holds NaN or infinity.

    >>> magnitude({"w": jnp.array([1.0, -3.0, 2.0, 0.5])}, 0.5)["w"].tolist()
    [False, True, True, False]

    **Follows**: Han et al. 2015, "Learning both Weights and Connections for Efficient
    Neural Networks", pruning by magnitude.

    **Differs**: counts are exact under ties, where a threshold keeps too many.
    """
    _check("magnitude", tree_, density, scope)
    if check_finite:
        tree.check_finite("magnitude", tree_)
    tree_ = jax.tree.map(jnp.asarray, tree_)
    if scope == "global":
        return tree.tree_top_mask(
            tree_, share("magnitude", "density", density, tree.size(tree_))
        )

    def leaf(x):
        rows = scope == "row" and x.ndim > 0
        length = x.shape[-1] if rows else x.size
        count = share("magnitude", "density", density, length)
        return tree.top_mask(x, count, rows=rows)

    return jax.tree.map(leaf, tree_)


def random(
    key: chex.PRNGKey, tree_: chex.ArrayTree, density: float, scope: str = "leaf"
) -> chex.ArrayTree:
    """Keeps random entries, exactly floor(density * n) of them.

    Args:
      key: typed PRNG key.
      tree_: tree of arrays or of `jax.ShapeDtypeStruct`; only shapes are read.
      density: fraction kept, in [0, 1]; static.
      scope: "leaf", "row" or "global", see `magnitude`.

    Returns:
      Tree of bool like `tree_`, uniform over all masks of that count.

    Raises:
      ValueError: if the density or the scope is wrong.

    >>> mask = random(jax.random.key(0), {"w": jnp.zeros((4, 5))}, 0.25)
    >>> int(mask["w"].sum())
    5
    """
    leaves, treedef = jax.tree.flatten(tree_)
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [
        jax.random.uniform(k, jnp.shape(leaf), jnp.float32)
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    noise = treedef.unflatten(noise)
    _check("random", noise, density, scope)
    return magnitude(noise, density, scope, check_finite=False)
