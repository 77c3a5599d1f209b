"""Decompositions of stacked matrices on CPUs: side by side, and without a deadlock.

One call of LAPACK for a stack takes its matrices one after another. A call for each
lets XLA run several at once: eight SVDs of 1024 x 1024 matrices take two thirds of the
time on two cores. So short stacks of matrices that are worth it become single calls.

From 0.10.0 to 0.11.0, jaxlib spreads a stack over the threads that run the program,
and every such call holds a thread until its stack is done. As many of them as there
are threads, independent of each other in one program, wait for ever. There, matrices
of other stacks are decomposed in a loop. An axis that `jax.vmap` adds is a stack again,
of which nothing is known here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

# The first version that waits, and the first after it that does not.
_FIRST, _MENDED = (0, 10, 0), (0, 11, 1)
_WAITS = _FIRST <= tuple(jaxlib.version.__version_info__) < _MENDED
# A call each: for stacks of at most so many matrices of at least such a size.
_CALLS, _SIZE = 16, 128


def stacked(fn: Callable[..., Any], *stacks: jax.Array) -> Any:
    """A decomposition of matrices in the last two axes.

    Args:
      fn: of arrays [..., m, n] with the same leading axes, each matrix by itself.
      *stacks: its arguments.

    Returns:
      What `fn` returns.
    """
    *lead, rows, columns = stacks[0].shape
    count = math.prod(lead)
    apart = 1 < count <= _CALLS and min(rows, columns) >= _SIZE
    if not lead or not (apart or _WAITS):
        return fn(*stacks)

    def one_by_one(*stacks):
        flat = [x.reshape(count, *x.shape[-2:]) for x in stacks]
        if apart:
            each = [fn(*(x[i] for x in flat)) for i in range(count)]
            found = jax.tree.map(lambda *y: jnp.stack(y), *each)
        else:
            found = jax.lax.map(lambda each: fn(*each), flat)
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), found)

    return jax.lax.platform_dependent(*stacks, cpu=one_by_one, default=fn)
