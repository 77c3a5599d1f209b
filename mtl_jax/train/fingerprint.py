"""What a checkpoint says of the run it belongs to, and how another run differs.

Names and shapes of every leaf of the state are compared when the checkpoint is read.
This is about the rest. Functions have no honest fingerprint: what a loss computes, or
a learning rate inside an optax transformation, is told apart by `identity` only.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from mtl_jax import tree as mtl_tree
from mtl_jax.train.state import TrainState

__all__ = ["describe_batch", "describe_run", "differences", "refuse"]


def describe_run(
    state: TrainState,
    *,
    seed: int,
    accumulate: int,
    ema: float | None,
    identity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Plain data that is equal for two calls of `fit` that mean the same run.

    Args:
      state: of arrays or shapes.
      seed: of the run.
      accumulate: microbatches per step.
      ema: decay of the average.
      identity: plain data by which the caller tells runs apart.

    Raises:
      ValueError: when `identity` is no plain data.
    """
    return {
        "seed": seed,
        "accumulate": accumulate,
        "ema": ema,
        "optimizer": list(_classes(state.opt_state)),
        "frozen": [
            mtl_tree.path_str(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(state.frozen)
        ],
        "identity": _plain(identity),
    }


def describe_batch(batch: Any) -> dict[str, str]:
    """Path -> dtype and global shape of every leaf of a batch.

    >>> describe_batch({"x": np.zeros((8, 4), np.float32)})
    {'x': 'float32[8, 4]'}
    """
    return {
        mtl_tree.path_str(path) or "batch": f"{x.dtype}{list(np.shape(x))}"
        for path, x in jax.tree_util.tree_leaves_with_path(batch)
    }


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One phrase per entry that differs.

    >>> differences({"seed": 0, "ema": None}, {"seed": 1, "ema": 0.9})
    ['seed is 0 there, 1 here', 'ema is not set there, 0.9 here']
    """
    there, here = dict(_flat(saved)), dict(_flat(found))
    phrases = []
    for name in dict.fromkeys((*there, *here)):
        absent = "trained" if name.startswith("leaf '") else "not set"
        first, second = there.get(name, absent), here.get(name, absent)
        if first != second:
            phrases.append(f"{name} is {first} there, {second} here")
    return phrases


def refuse(workdir: Any, saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Goes on only if what is saved in `workdir` belongs to this run.

    Raises:
      ValueError: naming what differs.
    """
    phrases = differences(saved, found)
    if len(phrases) > 5:
        phrases[5:] = [f"and {len(phrases) - 5} more"]
    if phrases:
        raise ValueError(f"fit: {workdir} holds another run: " + "; ".join(phrases))


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and JSON texts; None is left out."""
    if name == "frozen":
        yield from ((f"leaf {leaf!r}", "frozen") for leaf in node)
    elif isinstance(node, Mapping | list):
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in pairs:
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif node is not None:
        yield name, json.dumps(node)


def _classes(node: Any) -> Iterator[str]:
    """Names of the named tuples in a tree, in order: what a chain is made of."""
    if hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode):
        yield type(node).__name__
    children = node.values() if isinstance(node, Mapping) else node
    if isinstance(node, Mapping | tuple | list):
        for child in children:
            yield from _classes(child)


def _plain(identity: Mapping[str, Any] | None) -> Any:
    try:
        return json.loads(json.dumps(identity, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"fit: identity wants plain data (numbers, strings, lists, dicts): {error}"
        ) from None
