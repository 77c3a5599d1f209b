"""Decompositions of stacked matrices, without a deadlock of some versions of jaxlib.

From 0.10.0 to 0.11.0, jaxlib spreads a stack of matrices over the threads that run the
program on CPUs, and every such call holds a thread until its stack is done. As many of
them as there are threads, independent of each other in one program, wait for ever.
There, matrices are decomposed one after another, as newer versions do by themselves. An
axis that `jax.vmap` adds is a stack again, of which nothing is known here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version

# The first version that waits, and the first after it that does not.
_FIRST, _MENDED = (0, 10, 0), (0, 11, 1)
_WAITS = _FIRST <= tuple(jaxlib.version.__version_info__) < _MENDED


def stacked(fn: Callable[..., Any], *stacks: jax.Array) -> Any:
    """A decomposition of matrices in the last two axes.

    Args:
      fn: of arrays [..., m, n] with the same leading axes, each matrix by itself.
      *stacks: its arguments.

    Returns:
      What `fn` returns.
    """
    if not _WAITS or stacks[0].ndim == 2:
        return fn(*stacks)

    def in_turn(*stacks):
        lead = stacks[0].shape[:-2]
        flat = [x.reshape(math.prod(lead), *x.shape[-2:]) for x in stacks]
        found = jax.lax.map(lambda each: fn(*each), flat)
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), found)

    return jax.lax.platform_dependent(*stacks, cpu=in_turn, default=fn)
