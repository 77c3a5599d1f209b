"""LiNeS: the deeper the layer, the more of its change is kept."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def layer_index(path: str) -> int | None:
    """Index of the layer that a leaf belongs to: the first number in its name.

    Args:
      path: name of the leaf.

    Returns:
      The number, where it ends a part of the name; None where there is none.

    >>> layer_index("blocks_3/mlp/kernel"), layer_index("model.layers.11.mlp.weight")
    (3, 11)
    >>> layer_index("embedding/table") is None
    True
    """
    found = re.search(r"(?:^|[/._])(\d+)(?=[/.]|$)", path)
    return int(found[1]) if found else None


def lines(
    delta: Any,
    *,
    first: float,
    last: float,
    layer: Callable[[str], int | None] = layer_index,
    num_layers: int | None = None,
    stacked: str | None = None,
) -> Any:
    """Scales a delta from the first layer to the last.

      result = (first + (last - first) l / (L - 1)) delta   in layer l of L
      result = first delta                                  outside of the layers

    Works on what any merge returns.

    Args:
      delta: leaves [...].
      first: scale of the first layer and of what is in no layer, the paper's alpha.
      last: scale of the last layer, the paper's alpha + beta.
      layer: names to indices of layers from 0 on, None for leaves outside of them.
      num_layers: L; by default one more than the largest index.
      stacked: regular expression, searched in names, of the leaves that hold all
        layers along their first axis, as those of `nn.scan` do.

    Returns:
      Tree like `delta` in its dtypes; computed in float32 (or wider), cast once.
      Leaves that are not floating point are returned as they are.

    Raises:
      ValueError: scales that are no numbers, no layers, an index that is not one of
        them, or leaves of stacked layers of another number.

    Follows: Wang et al. 2025, "LiNeS: Post-training Layer Scaling Prevents Forgetting
      and Enhances Model Merging". For one task the authors' first scale is
      tuned and the last is 1; for T tasks the first is
      |sum_t tau_t| / (T |merged|), and last - first is tuned.
    Differs: a model of one layer takes the first scale.

    >>> delta = {"blocks_0": jnp.ones(1), "blocks_1": jnp.ones(1), "head": jnp.ones(1)}
    >>> [v.tolist() for v in lines(delta, first=0.25, last=1.0).values()]
    [[0.25], [1.0], [0.25]]
    """
    first = _compose.number("lines", "first", first)
    last = _compose.number("lines", "last", last)
    leaves = dict(zip(tree.paths(delta), jax.tree.leaves(delta), strict=True))
    whole = {
        name for name in leaves if stacked is not None and re.search(stacked, name)
    }
    if stacked is not None and not whole:
        raise ValueError(f"lines: stacked is {stacked!r}, which no leaf matches")
    place = {name: layer(name) for name in leaves if name not in whole}
    depths = {
        name: 0 if not jnp.ndim(leaves[name]) else len(leaves[name]) for name in whole
    }
    found = [i + 1 for i in place.values() if i is not None] + list(depths.values())
    if not found:
        raise ValueError(
            f"lines: no leaf is in a layer; there are {', '.join(list(leaves)[:4])}"
        )
    count = max(found) if num_layers is None else num_layers
    for name, i in place.items():
        if i is not None and not 0 <= i < count:
            raise ValueError(f"lines: {name!r} is in layer {i}, there are {count}")
    for name, depth in depths.items():
        if depth != count:
            raise ValueError(
                f"lines: {name!r} stacks {depth} layers, there are {count}"
            )
    step = (last - first) / max(count - 1, 1)

    def scale(name, x):
        if not tree.is_inexact(x):
            return x
        wide = tree.wide_dtype(x.dtype)
        if name in whole:
            factor = first + step * jnp.arange(count, dtype=wide)
            factor = factor.reshape(-1, *(1,) * (x.ndim - 1))
        else:
            factor = jnp.asarray(first + step * (place[name] or 0), wide)
        return (factor * x.astype(wide)).astype(x.dtype)

    return tree.map_with_path(scale, delta)
