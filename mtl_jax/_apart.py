"""Small arrays that many leaves share, kept apart where leaves are sharded."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def apart(number: int, values: Any) -> Any:
    """The same values, which the compiler takes for others than those of other leaves.

    Compilers share equal expressions. A scalar spread over leaves of one shape becomes
    one array, which can be sharded like one of them only and is then gathered, at the
    memory of a whole leaf, for the others.

    Args:
      number: of the leaf; values of leaves with different numbers are kept apart.
      values: tree of small arrays.

    Returns:
      The tree; where nothing is traced, as it is.
    """
    if not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(values)):
        return values
    tag = jnp.uint32(number)
    found, values = jax.lax.optimization_barrier((tag, values))
    return jax.tree.map(lambda v: jnp.where(found == tag, v, jnp.zeros_like(v)), values)
