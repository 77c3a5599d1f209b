"""Keys and values that every query sees besides those of the tokens."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp


def in_front(
    prefix: Mapping[str, chex.Array] | None, key: chex.Array, value: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """Keys and values [P, K, d] or [B, P, K, d] in front of those [B, S, K, d]."""
    if prefix is None:
        return key, value

    def join(more, x):
        more = more.astype(x.dtype)
        more = more[None] if more.ndim == 3 else more
        more = jnp.broadcast_to(more, (x.shape[0], *more.shape[1:]))
        return jnp.concatenate([more, x], axis=1)

    return join(prefix["key"], key), join(prefix["value"], value)


def check_prefix(
    where: str,
    prefix: Mapping[str, chex.Array] | None,
    *,
    depth: int,
    batch: int,
    heads: int,
    dim: int,
) -> None:
    """Refuses what is not {"key", "value"} of [depth, P, K, d] or [depth, B, P, K, d].

    Raises:
      ValueError: beginning with `where`.
    """
    if prefix is None:
        return
    if set(prefix) != {"key", "value"}:
        raise ValueError(f"{where} wants key and value, has {sorted(prefix)}")
    for name, array in prefix.items():
        free = (array.shape[-3],) if array.ndim > 3 else (0,)
        rows = (batch,) if array.ndim == 5 else ()
        shape = (depth, *rows, *free, heads, dim)
        if array.shape != shape:
            raise ValueError(f"{where} {name} is {array.shape}, wanted {shape}")
