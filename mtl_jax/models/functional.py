"""From a Linen module to the `apply_fn(params, *inputs)` that transforms take."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn


def functional(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    method: str | Callable | None = None,
    **call_options: Any,
) -> tuple[Callable[..., Any], chex.ArrayTree]:
    """Splits a module with its variables into a pure function and its parameters.

    Every collection other than "params" (batch statistics, for instance) is closed
    over and read only: its values stay what they are in `variables`.

    Args:
      module: a Linen module.
      variables: what `module.init` returned, or `{"params": ...}`.
      method: name of the method to call, or the method; None = `__call__`.
      **call_options: keyword arguments of every call, such as `return_hidden=True`.

    Returns:
      (apply_fn, params), with `apply_fn(params, *inputs, **more) -> outputs`. `more`
      goes to the method, except for `rngs`, which Linen takes.

    Raises:
      ValueError: if there is no "params" collection.

    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(4, 2))
    >>> x = jnp.ones((3, 5))
    >>> apply_fn, params = functional(mlp, mlp.init(jax.random.key(0), x))
    >>> apply_fn(params, x).shape
    (3, 2)
    """
    if "params" not in variables:
        raise ValueError(
            f"functional: wanted a 'params' collection, found {sorted(variables)}"
        )
    frozen = {name: tree for name, tree in variables.items() if name != "params"}

    def apply_fn(params, *inputs, **more):
        return module.apply(
            {"params": params, **frozen},
            *inputs,
            method=method,
            **{**call_options, **more},
        )

    return apply_fn, variables["params"]
