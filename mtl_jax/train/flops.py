"""FLOPs of a function, counted on its jaxpr.

A compiled program's own estimate counts the body of a loop once; here every `scan` is
multiplied by its length, and every recomputation under `remat` is seen.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex


class Flops(NamedTuple):
    """Floating-point operations of matrix products and convolutions.

    Attributes:
      total: over all devices; a multiply and an add are two.
      while_loops: loops whose trip count is not in the program; their bodies are
        counted once, so with any such loop `total` is a lower bound.
    """

    total: int
    while_loops: int


def count_flops(fn: Callable[..., Any], *args: Any) -> Flops:
    """Counts the matrix products and convolutions that `fn(*args)` runs.

      dot_general: 2 x size of the output x contracted size
      convolution: 2 x size of the output x window x input channels of a group

    `scan` counts its body times its length, `cond` its most expensive branch,
    `shard_map` its body on every device, a Pallas kernel its body times its grid.
    Zeros that a strided convolution's gradient inserts count like other numbers.

    Args:
      fn: traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The totals.

    >>> x = jax.ShapeDtypeStruct((4, 8), "float32")
    >>> w = jax.ShapeDtypeStruct((8, 16), "float32")
    >>> count_flops(lambda x, w: x @ w, x, w).total == 2 * 4 * 8 * 16
    True
    """
    return _walk(jax.make_jaxpr(fn)(*args).jaxpr)


def _walk(jaxpr: jex.Jaxpr) -> Flops:
    total = loops = 0
    for eqn in jaxpr.eqns:
        found = _equation(eqn)
        total += found.total
        loops += found.while_loops
    return Flops(total, loops)


def _equation(eqn: Any) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return Flops(2 * _size(eqn) * math.prod(lhs[d] for d in contract), 0)
    if name == "conv_general_dilated":
        rhs = eqn.invars[1].aval.shape
        out_features = rhs[params["dimension_numbers"].rhs_spec[0]]
        return Flops(2 * _size(eqn) * (math.prod(rhs) // max(out_features, 1)), 0)
    if name == "ragged_dot_general":
        return Flops(_ragged(eqn), 0)
    parts = [_walk(sub) for sub in _subjaxprs(params)]
    if not parts:
        return Flops(0, 0)
    if name == "cond":
        return Flops(max(p.total for p in parts), max(p.while_loops for p in parts))
    total = sum(p.total for p in parts)
    loops = sum(p.while_loops for p in parts) + (name == "while")
    return Flops(total * _repeats(name, params), loops)


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
    if name == "shard_map":
        mesh = params["mesh"]
        return math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _ragged(eqn: Any) -> int:
    """Each row meets one group: lhs size times the free dimensions of rhs."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    bound = {*contract, *batch, *numbers.rhs_group_dimensions}
    rhs = eqn.invars[1].aval.shape
    free = math.prod(n for dim, n in enumerate(rhs) if dim not in bound)
    return 2 * math.prod(eqn.invars[0].aval.shape) * free


def _size(eqn: Any) -> int:
    return math.prod(eqn.outvars[0].aval.shape)


def _subjaxprs(params: dict[str, Any]) -> Iterator[jex.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item
