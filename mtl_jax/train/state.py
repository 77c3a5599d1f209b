"""The state of a training run, and the split into trained and frozen leaves."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding
from mtl_jax.train.trainable import Trainable


class PerTaskState(NamedTuple):
    """Optimizer state of a trainable with an aggregator.

    Attributes:
      aggregator: state of the aggregator, of the shared leaves.
      tx: state of the optimizer, of all trained leaves.
    """

    aggregator: Any
    tx: Any


class TrainState(NamedTuple):
    """Everything a run needs to go on, and all that a checkpoint holds of it.

    Attributes:
      step: int32 [], optimizer steps done.
      params: trained leaves; None where a leaf is frozen.
      frozen: frozen leaves; None where a leaf is trained.
      opt_state: optimizer state of the trained leaves; a `PerTaskState` where the
        trainable has an aggregator.
      ema: float32 running average of the trained leaves, or None.
      key: typed PRNG key of the run; step n draws from `fold_in(key, n)`.
      finite: bool [], False from the first step on whose loss or gradient was not
        finite; such a step and all later ones leave the rest of the state as it is.
    """

    step: chex.Array
    params: Any
    frozen: Any
    opt_state: Any
    ema: Any
    key: chex.PRNGKey
    finite: chex.Array


def split(params: chex.ArrayTree, frozen: Sequence[str]) -> tuple[Any, Any]:
    """Splits a tree into (trained, frozen), each with None in the other's places.

    Args:
      params: tree of arrays or shapes.
      frozen: regexes; a leaf whose path one of them is found in is frozen.

    Raises:
      ValueError: when a regex matches no leaf, when nothing is left to train, or
        when a leaf left to train is not floating point.
    """
    patterns = [re.compile(pattern) for pattern in frozen]
    names = [
        mtl_tree.path_str(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise ValueError(
                f"split: frozen pattern {pattern.pattern!r} matches none of the "
                f"{len(names)} leaves, such as {names[:3]}"
            )
    leaves, treedef = jax.tree.flatten(params)
    hits = [any(p.search(name) for p in patterns) for name in names]
    if all(hits):
        raise ValueError("split: every leaf is frozen, nothing is left to train")
    for name, leaf, hit in zip(names, leaves, hits, strict=True):
        if not hit and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"split: {name!r} is {leaf.dtype}, only floating leaves can be "
                "trained; add it to frozen"
            )
    pairs = [
        (None, x) if hit else (x, None) for x, hit in zip(leaves, hits, strict=True)
    ]
    return (
        jax.tree.unflatten(treedef, [trained for trained, _ in pairs]),
        jax.tree.unflatten(treedef, [kept for _, kept in pairs]),
    )


def split_shared(params: Any, shared: Sequence[str]) -> tuple[Any, Any]:
    """Splits trained leaves into (shared, others), with None in the other's places.

    Args:
      params: trained leaves, None where a leaf is frozen.
      shared: regexes; a leaf whose path one of them is found in is shared.

    Raises:
      ValueError: when a regex matches no trained leaf.
    """
    names = mtl_tree.paths(params)
    for pattern in shared:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"split_shared: shared pattern {pattern!r} matches none of the "
                f"{len(names)} trained leaves, such as {names[:3]}"
            )
    hits = mtl_tree.select(params, *shared)
    return (
        jax.tree.map(lambda x, hit: x if hit else None, params, hits),
        jax.tree.map(lambda x, hit: None if hit else x, params, hits),
    )


def merge(params: Any, frozen: Any) -> chex.ArrayTree:
    """Inverse of `split` and of `split_shared`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, params, frozen, is_leaf=lambda x: x is None
    )


def init_state(
    trainable: Trainable,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step; every leaf is a fresh array."""
    trained, frozen = split(jax.tree.map(_fresh, params), trainable.frozen)
    average = None
    if ema:
        average = jax.tree.map(
            lambda x: _fresh(x).astype(mtl_tree.wide_dtype(x.dtype)), trained
        )
    with lenient_promotion():
        opt_state = trainable.tx.init(trained)
        if trainable.aggregator is not None:
            shared, _ = split_shared(trained, trainable.shared)
            opt_state = PerTaskState(
                aggregator=trainable.aggregator.init(shared), tx=opt_state
            )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        opt_state=jax.tree.map(_fresh, opt_state),
        ema=average,
        key=_fresh(key),
        finite=jnp.ones((), jnp.bool_),
    )


def abstract_state(
    trainable: Trainable, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state; computes nothing.

    Raises:
      ValueError: naming the leaf, when rules do not cover it or do not fit it.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(trainable.init, key)
    specs = sharding.specs_from_rules(params, trainable.rules)
    sharding.shardings(mesh, params, specs)
    state = jax.eval_shape(
        lambda p, k: init_state(trainable, p, k, ema=ema), params, key
    )
    placed = sharding.like_params(state, params, specs)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        state,
        placed,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


@contextlib.contextmanager
def lenient_promotion() -> Iterator[None]:
    """JAX's default promotion: optimizers of others mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _fresh(x: Any) -> jax.Array:
    """A copy that shares no buffer with `x` and has no weak type."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.clone(x)
    return jnp.array(x, dtype=x.dtype, copy=True)
