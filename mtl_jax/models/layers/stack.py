"""A stack of equal blocks: unrolled or scanned, with or without remat."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.layers.remat import rematerialised
from mtl_jax.placement import keep_split

_LAYER = re.compile(r"layers_(\d+)")


def run_stack(
    make_block: Callable[[str], nn.Module],
    num_layers: int,
    x: chex.Array,
    bias: chex.Array | None,
    *,
    scan: bool = False,
    remat: bool | str = False,
    collect: bool = False,
) -> tuple[chex.Array, tuple[chex.Array, ...]]:
    """Applies `num_layers` blocks in order, inside a compact method.

    Unrolled, the parameters of block i are named `layers_i`; scanned, all live
    under `layers` with a leading axis of length `num_layers`, and compile time no
    longer grows with depth. Every variable collection is scanned, so adapters and
    sown intermediates that sit beside the parameters see their own slice.

    Args:
      make_block: name -> block; a block maps (x, bias) to the new x.
      num_layers: number of blocks.
      x: [B, L, D].
      bias: passed to every block unchanged.
      scan: use one scanned block.
      remat: what of each block is computed again in the backward pass; see
        `rematerialised`.
      collect: also return what every block put out.

    Returns:
      (last output, the outputs of all blocks when `collect`, else ()).
    """

    def call(block, x, bias, own, cache, layer):
        del own, layer
        return block(x, bias), cache

    options = {"scan": scan, "remat": remat, "collect": collect}
    x, _, outputs = _run(call, make_block, num_layers, x, bias, None, None, **options)
    return x, outputs


def run_layers(
    make_block: Callable[[str], nn.Module],
    num_layers: int,
    x: chex.Array,
    shared: Any,
    *,
    own: Any = None,
    cache: Mapping[str, Any] | None = None,
    scan: bool = False,
    remat: bool | str = False,
    collect: bool = False,
) -> tuple[chex.Array, dict[str, Any] | None, tuple[chex.Array, ...]]:
    """`run_stack` for blocks with inputs of their own and a cache that they write.

    A scanned stack carries its whole cache through the loop, so that a block writes
    the few entries that change in place instead of copying its share.

    Args:
      make_block: name -> block; a block maps (x, shared, own, cache, layer) to the
        new (x, cache). Unrolled, `cache` is that of the block and `layer` None;
        scanned, `cache` is the whole stack and `layer` its int32 index.
      num_layers: number of blocks.
      x: [B, L, D].
      shared: tree passed to every block unchanged.
      own: tree of arrays with a leading axis of length `num_layers`; every block
        gets its slice.
      cache: {"layers": stacked} when scanned, {"layers_0": ..., ...} otherwise.
      scan: see `run_stack`.
      remat: see `run_stack`.
      collect: see `run_stack`.

    Returns:
      (last output, the new cache, the outputs of all blocks when `collect`).
    """

    def call(block, x, shared, own, cache, layer):
        return block(x, shared, own, cache, layer)

    options = {"scan": scan, "remat": remat, "collect": collect}
    return _run(call, make_block, num_layers, x, shared, own, cache, **options)


def _run(
    call, make_block, num_layers, x, shared, own, cache, *, scan, remat, collect
) -> tuple[chex.Array, dict[str, Any] | None, tuple[chex.Array, ...]]:
    def body(block, carry, shared, own):
        x, cache = carry
        own, layer = own
        x, cache = call(block, keep_split(x, "data"), shared, own, cache, layer)
        x = keep_split(x, "data")
        return (x, cache), (x if collect else None)

    body = rematerialised(body, remat, prevent_cse=not scan)
    if scan and num_layers:
        run = nn.scan(
            body,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=(nn.broadcast, 0),
            length=num_layers,
        )
        carry = x, None if cache is None else cache["layers"]
        inputs = own, jnp.arange(num_layers, dtype=jnp.int32)
        (x, stack), outputs = run(make_block("layers"), carry, shared, inputs)
        written = None if cache is None else {"layers": stack}
        return x, written, tuple(outputs) if collect else ()
    outputs, written = [], {}
    for i in range(num_layers):
        name = f"layers_{i}"
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], own)
        carry = x, None if cache is None else cache[name]
        (x, written[name]), output = body(make_block(name), carry, shared, (mine, None))
        outputs.append(output)
    new = None if cache is None else written
    return x, new, tuple(outputs) if collect else ()


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Moves `layers_0 ... layers_{n-1}` under one `layers` with a leading axis.

    Args:
      params: parameters of an unrolled backbone (top level holds the layers).

    Returns:
      Parameters of the same backbone built with `scan=True`.

    Raises:
      ValueError: if there is no layer, or the numbers have a gap.

    >>> import jax.numpy as jnp
    >>> params = {"layers_0": {"w": jnp.zeros(3)}, "layers_1": {"w": jnp.ones(3)}}
    >>> stack_layers(params)["layers"]["w"].shape
    (2, 3)
    """
    found = {int(m[1]): k for k in params if (m := _LAYER.fullmatch(k))}
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            f"stack_layers: wanted layers_0 ... layers_n without a gap, found "
            f"{sorted(params)}"
        )
    layers = [params[found[i]] for i in range(len(found))]
    rest = {k: v for k, v in params.items() if k not in found.values()}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `stack_layers`.

    Args:
      params: parameters of a scanned backbone.

    Returns:
      Parameters of the same backbone built with `scan=False`.

    Raises:
      ValueError: if there is no `layers`, or its leaves disagree on their number.
    """
    if "layers" not in params:
        raise ValueError(f"unstack_layers: wanted 'layers', found {sorted(params)}")
    depths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params["layers"])}
    if len(depths) != 1 or depths == {()}:
        raise ValueError(
            f"unstack_layers: leaves of 'layers' must share their leading axis, "
            f"found {sorted(depths)}"
        )
    rest = {k: v for k, v in params.items() if k != "layers"}
    for i in range(depths.pop()[0]):
        rest[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    return rest
