"""Sharding of transformer blocks: rules for parameters, as data.

Rules are (regex, PartitionSpec) pairs over the mesh axes `data` and `model`; the
first match on the path of a leaf wins. One axis of every kernel is split over
`model` (column-parallel into the block, row-parallel out of it) and the other over
`data`, so that parameters and optimizer state are fully sharded.
"""

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


def without_axis(rules: Rules, axis: str) -> Rules:
    """The same rules, but whole along one axis of the mesh.

    Without `data` they are those of decoding, which reads every weight once a token:
    there a device keeps its part of the weights instead of gathering others.
    """

    def drop(entry):
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name != axis)
        return None if entry == axis else entry

    return tuple((regex, P(*map(drop, spec))) for regex, spec in rules)
