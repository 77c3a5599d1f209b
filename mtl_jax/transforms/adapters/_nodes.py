"""Adapters as nested dicts by the parts of leaf names."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtl_jax import tree
from mtl_jax.transforms.quantization import nf4


def named_leaves(params: Any) -> dict[str, Any]:
    """Leaves by name; quantised ones whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=nf4.is_quantized)
    return {tree.path_str(path): leaf for path, leaf in flat}


def factors(fn_name: str, lora: Any) -> dict[str, tuple[Any, Any]]:
    """Name of the adapted leaf -> (a, b).

    Raises:
      ValueError: on what is no adapter.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (named := named_leaves(lora)):
        leaf, _, part = name.rpartition("/")
        found.setdefault(leaf, {})[part] = named[name]
    for name, parts in found.items():
        if set(parts) != {"a", "b"}:
            raise ValueError(
                f"lora.{fn_name}: {name!r} of the adapter has {sorted(parts)}, wanted "
                "a and b"
            )
        a, b = parts["a"].shape, parts["b"].shape
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2] or a[:-2] != b[:-2]:
            raise ValueError(
                f"lora.{fn_name}: {name!r} has a {a} and b {b}, wanted "
                "[..., in, r] and [..., r, out]"
            )
    if not found:
        raise ValueError(f"lora.{fn_name}: the adapter is empty")
    return {name: (parts["a"], parts["b"]) for name, parts in found.items()}


def put(out: dict[str, Any], parts: Sequence[str], values: Any) -> None:
    """Sets or updates the node at a path, making what is missing."""
    *above, last = parts
    for part in above:
        out = out.setdefault(part, {})
    if isinstance(values, dict):
        out.setdefault(last, {}).update(values)
    else:
        out[last] = values


def copied(params: Any) -> Any:
    """The same leaves in dicts of their own."""
    if isinstance(params, Mapping):
        return {key: copied(value) for key, value in params.items()}
    return params
