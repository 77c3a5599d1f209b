"""What the backward pass of a block keeps, and what it computes again."""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_PRODUCT = "product"
REMATS = (False, True, "none", "full", "products")


def keep_product(x: chex.Array) -> chex.Array:
    """Marks x, the output of a Dense layer or of attention, for `remat="products"`."""
    return checkpoint_name(x, _PRODUCT)


def rematerialised(
    body: Callable[..., Any], remat: bool | str, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    """`nn.remat` as an option of a model.

    Args:
      body: function of a block and its inputs.
      remat: False or "none" keeps whatever the backward pass needs; True or "full"
        keeps the inputs alone; "products" keeps what `keep_product` marks as well, so
        that norms, activations, what experts do and the products inside attention are
        computed again, but no product of a Dense layer.
      prevent_cse: see `jax.checkpoint`.

    Returns:
      The function, with the same values.

    Raises:
      ValueError: for any other `remat`.
    """
    if remat not in REMATS:
        raise ValueError(f"rematerialised: remat must be one of {REMATS}, is {remat!r}")
    if remat in (False, "none"):
        return body
    policy = None
    if remat == "products":
        policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
    return nn.remat(body, prevent_cse=prevent_cse, policy=policy)
