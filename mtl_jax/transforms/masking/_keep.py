"""Optimizers that leave masked entries alone."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import tree


def is_structural(mask: Any) -> bool:
    """Whether a mask leaf decides for a whole leaf or subtree, statically."""
    return isinstance(mask, (bool, np.bool_))


def arrays(name: str, mask: chex.ArrayTree) -> list[chex.Array | None]:
    """Elementwise leaves as arrays, None for structural ones.

    Raises:
      ValueError: if a leaf is neither a bool nor an array of bool.
    """
    out = []
    for path, leaf in zip(tree.paths(mask), jax.tree.leaves(mask), strict=True):
        dtype = getattr(leaf, "dtype", None)
        if not is_structural(leaf) and dtype != np.bool_:
            found = type(leaf).__name__ if dtype is None else dtype
            raise ValueError(f"{name}: {path!r} of the mask is {found}, wanted bool")
        out.append(None if is_structural(leaf) else jnp.asarray(leaf))
    return out


def split(name: str, mask: chex.ArrayTree, params: chex.ArrayTree) -> list[list[Any]]:
    """Leaves of `params` below each leaf of `mask`, a prefix of its structure.

    Raises:
      ValueError: if the mask is no prefix of `params`, or a shape differs.
    """
    leaves, treedef = jax.tree.flatten(mask)
    try:
        below = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name}: the mask must have the structure of the parameters, or a prefix "
            f"of it; {error}"
        ) from error
    out = []
    for path, leaf, sub in zip(tree.paths(mask), leaves, below, strict=True):
        subs = jax.tree.leaves(sub)
        if not is_structural(leaf):
            shapes = [jnp.shape(x) for x in subs]
            if shapes != [jnp.shape(leaf)]:
                raise ValueError(
                    f"{name}: {path!r} of the mask is {jnp.shape(leaf)}, "
                    f"the parameters there are {shapes}"
                )
        out.append(subs)
    return out


def apply(
    name: str,
    mask: chex.ArrayTree,
    bits: list[chex.Array | None],
    updates: chex.ArrayTree,
    zero: float = 0.0,
) -> chex.ArrayTree:
    """Replaces the updates of inactive entries by `zero`."""
    out = []
    decisions = jax.tree.leaves(mask)
    for decision, bit, subs in zip(
        decisions, bits, split(name, mask, updates), strict=True
    ):
        if bit is not None:
            out += [jnp.where(bit, u, jnp.full_like(u, zero)) for u in subs]
        else:
            out += subs if decision else [jnp.full_like(u, zero) for u in subs]
    return jax.tree.structure(updates).unflatten(out)


class KeepState(NamedTuple):
    """The elementwise masks, in the order of the mask's leaves; None if structural."""

    mask: list[chex.Array | None]


def keep(mask: chex.ArrayTree) -> optax.GradientTransformation:
    """Zeroes the updates of inactive entries. Place it last in a chain.

      u <- where(mask, u, 0)

    Placed before an optimizer with weight decay or momentum it does not hold entries
    still; `wrap` masks on both sides. The zero is minus zero, which leaves every
    parameter its own bits when added.

    Args:
      mask: tree like the parameters, or a prefix of their structure; leaves are Python
        bools (static, for a whole subtree) or bool arrays. True = active. Arrays live
        in the state, so they are checkpointed and not compiled into the step.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if the mask is not bool or does not fit the parameters.

    >>> tx = optax.chain(optax.sgd(0.5), keep({"w": jnp.array([True, False])}))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.5, 1.0]
    """
    bits = arrays("keep", mask)

    def init_fn(params):
        split("keep", mask, params)
        return KeepState(bits)

    def update_fn(updates, state, params=None):
        del params
        return apply("keep", mask, state.mask, updates, -0.0), state

    return optax.GradientTransformation(init_fn, update_fn)


class WrapState(NamedTuple):
    """The state of the inner transformation, and the elementwise masks."""

    inner: Any
    mask: list[chex.Array | None]


def wrap(
    inner: optax.GradientTransformation, mask: chex.ArrayTree
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on active entries: masks its gradients and its updates.

    Moments of inactive entries stay zero, norms for clipping see active entries only,
    and weight decay does not move the rest.

    Args:
      inner: any gradient transformation; extra arguments are passed on.
      mask: see `keep`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: if the mask is not bool or does not fit the parameters.

    >>> inner = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(0.1))
    >>> tx = wrap(inner, {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()[1]
    1.0
    """
    inner = optax.with_extra_args_support(inner)
    bits = arrays("wrap", mask)

    def init_fn(params):
        split("wrap", mask, params)
        return WrapState(inner.init(params), bits)

    def update_fn(updates, state, params=None, **extra):
        updates = apply("wrap", mask, state.mask, updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        updates = apply("wrap", mask, state.mask, updates, -0.0)
        return updates, WrapState(inner_state, state.mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
