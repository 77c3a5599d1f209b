"""Sharding of transformer blocks: rules for parameters, as data, and activations.

Rules are (regex, PartitionSpec) pairs over the mesh axes `data` and `model`; the
first match on the path of a leaf wins. One axis of every kernel is split over
`model` (column-parallel into the block, row-parallel out of it) and the other over
`data`, so that parameters and optimizer state are fully sharded.
"""

import chex
import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Rules = tuple[tuple[str, P], ...]

_BLOCK: Rules = (
    (r"attention/(query|key|value)/kernel", P("data", "model")),
    (r"attention/(query|key|value)/bias", P("model")),
    (r"attention/out/kernel", P("model", "data")),
    (r"mlp/in/kernel", P("data", "model")),
    (r"mlp/in/bias", P("model")),
    (r"mlp/out/kernel", P("model", "data")),
    (r"(attention|mlp)/out/bias", P()),
    (r"(norm_attention|norm_mlp)/(scale|bias)", P()),
)


def block_rules(rows: Rules) -> Rules:
    """Rules for leaves of one block, for unrolled and for scanned stacks.

    Args:
      rows: (regex of the path inside the block, spec of the unrolled leaf).

    Returns:
      Rules over whole paths.
    """
    return (
        *((rf"^(.*/)?layers_\d+/{regex}$", spec) for regex, spec in rows),
        *((rf"^(.*/)?layers/{regex}$", P(None, *spec)) for regex, spec in rows),
    )


BLOCK_RULES: Rules = block_rules(_BLOCK)


def keep_batch_split(x: chex.Array) -> chex.Array:
    """Holds the batch axis of an activation on the mesh axis `data`.

    Where parameters are split over `data` too, the compiler may gather activations
    instead of weights, at many times the memory; this leaves it no choice. Without a
    mesh in context (`jax.sharding.use_abstract_mesh`, which the trainer enters), or
    where `data` does not divide the batch or is managed by `shard_map`, nothing
    happens.

    Args:
      x: [B, ...].

    Returns:
      x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("data") != AxisType.Auto or x.shape[0] % mesh.shape["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, P("data"))
