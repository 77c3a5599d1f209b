"""Loops that are loops where that is as fast as writing them out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_WRITTEN_OUT = 8  # turns


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    length: int | None = None,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, written out for up to eight turns on a CPU.

    XLA's CPU backend runs convolutions about ten times slower inside a loop.

    Args:
      body: `body(carry, x) -> (carry, out)`.
      carry: tree.
      xs: tree, leaves [N, ...]; None with `length`.
      length: N, where `xs` does not tell.

    Returns:
      The last carry, and what the turns put out, leaves [N, ...].

    >>> total, sums = scan(lambda c, x: (c + x, c + x), 0, jnp.arange(4))
    >>> int(total), sums.tolist()
    (6, [0, 1, 3, 6])
    """

    def turns(carry, xs, **options):
        return jax.lax.scan(body, carry, xs, length, **options)

    leaves = jax.tree.leaves(xs)
    count = leaves[0].shape[0] if leaves else length
    if count == 1:
        # Not even a branch: what lies deeper in one stays slow.
        carry, out = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: jnp.asarray(x)[None], out)
    if count is None or count > _WRITTEN_OUT:
        return turns(carry, xs)
    return jax.lax.platform_dependent(
        carry, xs, cpu=lambda *a: turns(*a, unroll=True), default=turns
    )
