"""Leaf names and the checks of arguments that every public function shares."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def path_str(key_path: Sequence[Any]) -> str:
    """Readable name of a leaf, `"blocks/0/kernel"`.

    The attribute `value` that `flax.nnx` puts at the end of every path is dropped, so
    that one rule matches a model in every framework.

    Args:
      key_path: a key path of `jax.tree_util`.

    Returns:
      The keys joined by slashes; the empty string for a bare leaf.
    """
    key_path = tuple(key_path)
    if len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name, in leaf order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_str(path): leaf for path, leaf in flat}


def is_inexact(leaf: Any) -> bool:
    """True for floating point and complex leaves, those that arithmetic touches."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (float, complex))
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    dtype = np.dtype(type(leaf)) if dtype is None else dtype
    for kind in ("floating", "complexfloating", "integer", "bool"):
        if jnp.issubdtype(dtype, getattr(jnp, kind, np.bool_)):
            return kind
    return str(dtype)


def _check_arrays(fn_name: str, named: dict[str, Any], where: str) -> None:
    for name, leaf in named.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
            leaf, (bool, int, float, complex)
        ):
            raise ValueError(
                f"{fn_name}: {name!r} in {where} is a {type(leaf).__name__}, not an "
                "array; keep only the arrays (equinox.filter, nnx.split) first"
            )
        dtype = getattr(leaf, "dtype", None)
        if getattr(dtype, "kind", "f") in "OSUMm":
            raise ValueError(
                f"{fn_name}: {name!r} in {where} has dtype {dtype}, wanted numbers"
            )


def check_match(
    fn_name: str,
    reference: Any,
    other: Any,
    *,
    reference_name: str = "base",
    other_name: str = "other",
) -> None:
    """Refuses, by leaf name, a tree that does not look like the reference.

    Compares the sets of leaves, shapes and kinds of dtype (not widths: bfloat16 goes
    with float32), then the containers.

    Args:
      fn_name: the public function on whose behalf the check runs.
      reference: tree of arrays or of anything with `shape` and `dtype`.
      other: the tree to check.
      reference_name: what to call the reference in messages.
      other_name: what to call the other tree in messages.

    Raises:
      ValueError: naming the function, the leaf, what was found and what was wanted.
    """
    want, have = named_leaves(reference), named_leaves(other)
    for name in want:
        if name not in have:
            raise ValueError(
                f"{fn_name}: {name!r} is in {reference_name} but not in {other_name}"
            )
    for name in have:
        if name not in want:
            raise ValueError(
                f"{fn_name}: {name!r} is in {other_name} but not in {reference_name}"
            )
    _check_arrays(fn_name, want, reference_name)
    _check_arrays(fn_name, have, other_name)
    for name, leaf in want.items():
        found = have[name]
        pairs = ((np.shape(found), np.shape(leaf)), (_kind(found), _kind(leaf)))
        for got, wanted in pairs:
            if got != wanted:
                raise ValueError(
                    f"{fn_name}: {name!r} is {got} in {other_name}, "
                    f"{wanted} in {reference_name}"
                )
    if jax.tree.structure(reference) != jax.tree.structure(other):
        raise ValueError(
            f"{fn_name}: {other_name} has the leaves of {reference_name} in other "
            f"containers ({type(other).__name__} against {type(reference).__name__} at "
            "the top); convert one of them first"
        )


@jax.jit
def _all_finite(leaves):
    # 0 times NaN or infinity is NaN. A sum reads its operand once and stores nothing;
    # of `all(isfinite(leaf))` the booleans are stored first on CPUs.
    return [jnp.isfinite(jnp.sum(leaf * 0)) for leaf in leaves]


def check_finite(fn_name: str, tree: Any) -> None:
    """Refuses NaN and infinity, by leaf name; one fused pass on the device.

    Does nothing under a trace, where values are not known.

    Args:
      fn_name: the public function on whose behalf the check runs.
      tree: tree of arrays; leaves that are not floating point are not read.

    Raises:
      ValueError: naming the first offending leaf and how many there are.
    """
    named = {k: v for k, v in named_leaves(tree).items() if is_inexact(v)}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in named.values()):
        return
    with jax.ensure_compile_time_eval():  # Constants of a trace have values, too.
        flags = jax.device_get(_all_finite(list(named.values())))
    bad = [name for name, finite in zip(named, flags, strict=True) if not finite]
    if bad:
        more = f" (and {len(bad) - 1} more leaves)" if len(bad) > 1 else ""
        raise ValueError(f"{fn_name}: {bad[0]!r} holds NaN or infinity{more}")


def num_tasks(fn_name: str, tree: Any) -> int:
    """Length of the leading task axis, which all leaves must share.

    Raises:
      ValueError: no leaves, a scalar leaf, no tasks, or leaves that disagree.
    """
    named = named_leaves(tree)
    if not named:
        raise ValueError(f"{fn_name}: the tree of tasks has no leaves")
    first, count = "", None
    for name, leaf in named.items():
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(f"{fn_name}: {name!r} is a scalar, wanted a task axis")
        if count is None:
            first, count = name, shape[0]
        if shape[0] != count:
            raise ValueError(
                f"{fn_name}: {name!r} has {shape[0]} tasks, {first!r} has {count}"
            )
    if not count:
        raise ValueError(f"{fn_name}: {first!r} has no tasks, wanted at least one")
    return count


def share(fn_name: str, name: str, fraction: float, length: int) -> int:
    """floor(fraction * length), with the fraction read as the decimal it is written as.

    Plain floating point gives floor(0.29 * 100) = 28.

    Raises:
      ValueError: the fraction is not a number in [0, 1].
    """
    fraction = number(fn_name, name, fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{fn_name}: {name} is {fraction}, wanted 0 <= {name} <= 1")
    return math.floor(Fraction(repr(fraction)) * length)


def number(fn_name: str, name: str, value: Any) -> float:
    """A Python float; text, traced values, sequences and None are refused by name."""
    try:
        if not isinstance(value, str):
            return float(value)
    except TypeError:  # What JAX raises for a traced value is one, too.
        pass
    shown = " ".join(repr(value).split())
    raise ValueError(f"{fn_name}: {name} is {shown}, wanted a number")
