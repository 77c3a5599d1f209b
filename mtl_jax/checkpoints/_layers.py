"""Layers of a checkpoint, found in its tensor names: no list of architectures."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Numbered",
    "Place",
    "Stack",
    "count_keys",
    "find_stacks",
    "layer_counts",
    "numbered",
    "place",
    "restack_config",
    "side",
]

# What configs call the number of layers, at any depth.
_COUNTS = frozenset(
    (
        "decoder_layers",
        "depth",
        "encoder_layers",
        "n_layer",
        "n_layers",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_hidden_layers",
        "num_layers",
    )
)
# How names of what stands before or behind the layers begin or go on.
_BEFORE = re.compile(
    r"embed(?!_out)|embd|(^|\.)(wte|wpe|shared|conv\d|patch\w*|ln_pre|layernorm_pre)\.",
)
_BEHIND = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|score|classifier|pre_classifier|cls|"
    r"pooler|head|ln_f|norm|norm_f|final_layer_?norm|final_norm|layer_norm|layernorm|"
    r"post_layernorm|layernorm_post|ln_post|vocab_\w+)\."
)


# Words for parts of a model, in names of tensors and of config keys.
_PARTS = (("decoder",), ("encoder",), ("visual", "vision"), ("language", "text"))


class Stack(NamedTuple):
    """Layers `prefix + "0." ... prefix + f"{count - 1}."`."""

    prefix: str
    count: int


class Place(NamedTuple):
    """Where a tensor stands: in which layer of which stack, under what name."""

    stack: Stack
    layer: int
    suffix: str


class Numbered(NamedTuple):
    """A name around its first number.

    Attributes:
      stack: what comes before the number; "" outside of layers.
      layer: the number; None outside of layers.
      kind: what comes after it; outside of layers the whole name.
    """

    stack: str
    layer: int | None
    kind: str


def numbered(name: str, *, trees: bool = False) -> Numbered:
    """Splits a name at the first number that is a word of it.

    Args:
      name: of a tensor.
      trees: whether words may end at `/` and numbers begin at `_`, too, as in paths of
        trees.

    >>> numbered("model.layers.11.mlp.up_proj.weight")
    Numbered(stack='model.layers', layer=11, kind='mlp.up_proj.weight')
    >>> numbered("blocks_3/mlp/kernel", trees=True)
    Numbered(stack='blocks', layer=3, kind='mlp/kernel')
    """
    before, after = ("[./_]", "[./]") if trees else (r"\.", r"\.")
    found = re.search(rf"(?:^|(.*?){before})(\d+){after}(.+)$", name)
    if not found:
        return Numbered("", None, name)
    return Numbered(found[1] or "", int(found[2]), found[3])


def find_stacks(
    names: Iterable[str], config: Mapping[str, Any] | None
) -> tuple[Stack, ...]:
    """Stacks of layers among tensor names.

    A stack is a prefix behind which the integers 0 ... n-1 all stand, each with
    suffixes that repeat. Where the config gives numbers of layers, only stacks of such
    a number count as layers; a stack of one layer needs the config's word.
    """
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        stack, layer, kind = numbered(name)
        if stack and layer is not None:
            found.setdefault(f"{stack}.", {}).setdefault(layer, set()).add(kind)
    stacks = []
    for prefix, layers in found.items():
        whole = set(layers) == set(range(len(layers)))
        if whole and set.intersection(*layers.values()):
            stacks.append(Stack(prefix, len(layers)))
    counts = set(layer_counts(config or {}).values())
    if counts:
        return tuple(s for s in stacks if s.count in counts)
    return tuple(s for s in stacks if s.count > 1)


def layer_counts(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Path of every number of layers in a config -> the number."""
    return {
        path: value
        for path, value in _walk(config)
        if path[-1] in _COUNTS and isinstance(value, int) and value > 0
    }


def _walk(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        yield (*path, key), value
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, key))


def place(name: str, stacks: Iterable[Stack]) -> Place | None:
    """Where a tensor stands among stacks; None outside of all."""
    at = numbered(name)
    for stack in stacks:
        if at.layer is not None and f"{at.stack}." == stack.prefix:
            return Place(stack, at.layer, at.kind)
    return None


def side(name: str) -> str | None:
    """`before` or `behind` the layers, by the name; None if it does not say."""
    behind = bool(_BEHIND.search(name))
    before = bool(_BEFORE.search(name))
    if before and not (behind and re.search(r"(lm_head|cls|vocab_projector)\.", name)):
        return "before"
    return "behind" if behind else None


def count_keys(
    config: Mapping[str, Any], stack: Stack, stacks: Sequence[Stack]
) -> set[tuple[str, ...]]:
    """Which numbers of a config count the layers of a stack, by their paths.

    Raises:
      ValueError: if several stacks are as high and no key names this one.
    """
    keys = {path for path, n in layer_counts(config).items() if n == stack.count}
    alike = [other for other in stacks if other.count == stack.count]
    if len(alike) == 1 or not keys:
        return keys
    for words in _PARTS:
        if any(word in stack.prefix for word in words):
            named = {p for p in keys if any(word in ".".join(p) for word in words)}
            if not named and "encoder" in words:
                named = keys & {("num_layers",)}  # T5 counts its encoder so.
            if named:
                return named
    raise ValueError(
        f"config.json: which of {', '.join('.'.join(p) for p in sorted(keys))} counts "
        f"the layers {stack.prefix}N cannot be told"
    )


def restack_config(
    config: Mapping[str, Any],
    stack: Stack,
    stacks: Sequence[Stack],
    layers: Sequence[tuple[Mapping[str, Any], int]],
) -> dict[str, Any]:
    """A config for a stack that was put together anew.

    Numbers of layers that count the stack become the new one, and lists with one
    entry per layer (`layer_types`) follow the layers.

    Args:
      config: of the model that gives the output its config.
      stack: its stack.
      stacks: all of its stacks.
      layers: per new layer, the config and the layer that it comes from.
    """
    counts = count_keys(config, stack, stacks)

    def change(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        out = {}
        for key, value in node.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                value = change(value, here)
            elif here in counts:
                value = len(layers)
            elif _is_per_layer(key, value, stack.count) and _near(here, counts):
                value = [_at(source, here)[i] for source, i in layers]
            out[key] = value
        return out

    return change(config, ())


def _is_per_layer(key: str, value: Any, count: int) -> bool:
    return "layer" in key and isinstance(value, list) and len(value) == count


def _near(path: tuple[str, ...], counts: Iterable[tuple[str, ...]]) -> bool:
    """Whether a key stands beside one that counts the layers."""
    return any(path[:-1] == other[:-1] for other in counts)


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = config
    for key in path:
        node = node[key] if isinstance(node, Mapping) and key in node else None
    if not isinstance(node, list):
        raise ValueError(f"config.json: a source of layers has no {'.'.join(path)}")
    return node
