"""Gram matrices of what linear layers see, and the kernels that they belong to."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _spectral


class InputGram(NamedTuple):
    """What a linear layer saw of a batch.

    Attributes:
      total: [..., d, d], X^T X over its rows of inputs X [rows, d].
      rows: [...], how many rows there were.
    """

    total: jax.Array
    rows: jax.Array


def is_gram(x: Any) -> bool:
    """Whether it is an `InputGram`."""
    return isinstance(x, InputGram)


def views(
    fn_name: str, taus: Any, grams: Any, layout: _spectral.Layout, check_finite: bool
) -> dict[str, tuple[jax.Array, _spectral.View]]:
    """Leaf name -> its Gram [T, ..., d, d], and how its kernels are matrices [in, out].

    Raises:
      ValueError: no Gram, one that fits no kernel of `taus`, or NaN or infinity.
    """
    found, named = named_leaves(grams), named_leaves(taus)
    if not found:
        raise ValueError(f"{fn_name}: there is no Gram in grams")
    if check_finite:
        tree.check_finite(f"{fn_name}: grams", found)
    return {
        leaf: (jnp.asarray(gram), _view(fn_name, leaf, gram, named, layout))
        for leaf, gram in found.items()
    }


def _view(name, leaf, gram, named, layout):
    if leaf not in named:
        raise ValueError(f"{name}: grams hold {leaf!r}, which is no leaf of taus")
    shape, found = jnp.shape(named[leaf])[1:], jnp.shape(gram)
    dtype, lead = named[leaf].dtype, len(found) - 3
    square = lead >= 0 and found[-1] == found[-2] and found[0] == named[leaf].shape[0]
    inner = shape[max(lead, 0) :]
    for rows in range(1, len(inner)):
        side = math.prod(inner[:rows] if layout == "in_out" else inner[rows:])
        fits = square and shape[:lead] == found[1:-2] and side == found[-1]
        if fits and jnp.issubdtype(dtype, jnp.floating):
            return _spectral.View(lead, rows)
    raise ValueError(
        f"{name}: the Gram of {leaf!r} is {found}, its kernels {named[leaf].shape} "
        f"{dtype} ({layout}); wanted [T, ..., d, d] of the d inputs"
    )
