"""A model with some leaves left open, to be mixed from task vectors by gates."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms import merging


class RankOne(NamedTuple):
    """Experts a_e b_e^T of one leaf.

    Attributes:
      a: [E, ..., m].
      b: [E, ..., n].
    """

    a: chex.Array
    b: chex.Array


class Upscaled(NamedTuple):
    """A merged model of which some leaves wait for gates.

    Attributes:
      params: parameters; routed leaves are those of the base, the others are merged.
      experts: {router: {name of a routed leaf: task vectors [T, ...]}}, or experts of
        rank one, `RankOne`.
    """

    params: Any
    experts: dict[str, dict[str, Any]]


def upscale(
    base: Any,
    taus: Any,
    groups: Mapping[str, str],
    *,
    static_scale: float = 0.3,
    density: float = 1.0,
    check_finite: bool = True,
) -> Upscaled:
    r"""Merges what is not routed, and keeps what is.

      static leaves   base + static_scale * sum_t tau_t
      routed leaves   base, with every tau_t beside it

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...].
      groups: router -> regular expression of the leaves it mixes (`re.search`); each
        leaf has at most one. For `models.apply_routed` routers are named by modules.
      static_scale: strength of task arithmetic on the other leaves.
      density: keep the largest of each routed task vector, leaf by leaf.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      An `Upscaled`.

    Raises:
      ValueError: a group that finds no floating leaf, a leaf in two groups, trees that
        do not fit, a density outside of [0, 1], or NaN or infinity.

    Follows: Tang et al. 2024, "Merging Multi-Task Models via Weight-Ensembling Mixture
      of Experts", where the groups are the MLPs; with a density, Shen et al. 2024,
      "Efficient and Effective Weight-Ensembling Mixture of Experts", which prunes.

    >>> base, taus = {"a": jnp.zeros(2), "b": jnp.zeros(1)}, {
    ...     "a": jnp.ones((3, 2)), "b": jnp.ones((3, 1))}
    >>> model = upscale(base, taus, {"all": "a"}, static_scale=0.5)
    >>> model.params["b"].tolist(), list(model.experts["all"])
    ([1.5], ['a'])
    """
    if check_finite:
        tree.check_finite("upscale", base)
        tree.check_finite("upscale", taus)
    count = tree.num_tasks("upscale", taus)
    merged = merging.compose(base, taus, jnp.full(count, static_scale, jnp.float32))
    owners = _owners(base, groups)
    if density != 1.0:
        masks = merging.magnitude_masks(
            taus, density=density, scope="leaf", check_finite=False
        )
        taus = jax.tree.map(
            lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), taus, masks
        )
    named = named_leaves(taus)
    experts: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for name, owner in owners.items():
        experts[owner][name] = named[name]
    params = tree.map_with_path(
        lambda name, b, m: b if name in owners else m, base, merged
    )
    return Upscaled(params, experts)


def gated(model: Upscaled, gates: Any) -> Any:
    r"""Parameters for one setting of the gates, `base + sum_t g_t tau_t`.

    Args:
      model: see `upscale`.
      gates: [T] for all routers, or {router: [T]}.

    Returns:
      Tree like `model.params`, in its dtypes; computed in float32, cast once.

    Raises:
      ValueError: routers or gates that do not fit.

    >>> model = Upscaled({"a": jnp.zeros(2)}, {"all": {"a": jnp.eye(2)}})
    >>> gated(model, jnp.array([1.0, 3.0]))["a"].tolist()
    [1.0, 3.0]
    """
    if not isinstance(gates, Mapping):
        gates = dict.fromkeys(model.experts, gates)
    if set(gates) != set(model.experts):
        raise ValueError(
            f"gated: gates are of {sorted(gates)}, the model has routers "
            f"{sorted(model.experts)}"
        )
    named, moved = named_leaves(model.params), {}
    for router, experts in model.experts.items():
        own = {name: named[name] for name in experts}
        moved |= mixed(own, experts, jnp.asarray(gates[router]))
    return tree.map_with_path(lambda name, x: moved.get(name, x), model.params)


def mixed(params: Any, experts: Any, gates: chex.Array) -> Any:
    """`p + sum_e g_e tau_e` of the leaves that have experts, in the dtypes of `params`.

    Args:
      params: tree of parameters.
      experts: tree of some of its leaves, as in `Upscaled`.
      gates: [E].

    Returns:
      Tree like `params`.

    >>> experts = {"w": RankOne(jnp.ones((1, 2)), jnp.ones((1, 3)))}
    >>> mixed({"w": jnp.zeros((2, 3))}, experts, jnp.array([2.0]))["w"].tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(experts, is_leaf=_is_rank_one)
    found = {tree.path_str(path): node for path, node in flat}
    named = named_leaves(params)
    whole = {name: x for name, x in found.items() if not _is_rank_one(x)}
    moved = {}
    if whole:
        own = {name: named[name] for name in whole}
        moved = dict(merging.compose(own, whole, gates))
    for name in found.keys() - whole.keys():
        moved[name] = _rank_one(name, named[name], found[name], gates)
    return tree.map_with_path(lambda name, x: moved.get(name, x), params)


def _is_rank_one(node):
    return isinstance(node, RankOne)


def _rank_one(name, param, pair, gates):
    count = pair.a.shape[0]
    if gates.shape != (count,):
        raise ValueError(
            f"gated: gates are {gates.shape}, wanted ({count},), one for each expert "
            f"of {name!r}"
        )
    wide = tree.wide_dtype(param.dtype)
    a = jnp.moveaxis(pair.a.astype(wide), 0, -1)
    a = a * jnp.expand_dims(gates.astype(wide), range(a.ndim - 1))
    b = jnp.moveaxis(pair.b.astype(wide), 0, -2)
    delta = jnp.matmul(a, b, precision="highest")
    return (param.astype(wide) + delta).astype(param.dtype)


def per_example(
    apply_fn: Callable[..., Any], merge: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Applies a model of its own to every example: `apply_fn(merge(g_b), x_b)`.

    The leaves that `merge` makes from gates exist once per example while they are used.

    Args:
      apply_fn: `apply_fn(params, *inputs)`, inputs and outputs with leading axis B.
      merge: gates of one example -> params.

    Returns:
      `apply(gates, *inputs)`, with gates of leaves [B, ...].

    >>> apply = per_example(lambda w, x: w * x, lambda gate: 2 * gate)
    >>> apply(jnp.array([1.0, 3.0]), jnp.ones(2)).tolist()
    [2.0, 6.0]
    """

    def one(gates, inputs):
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], inputs)
        return jax.tree.map(lambda y: y[0], apply_fn(merge(gates), *batch))

    def apply(gates, *inputs):
        return jax.vmap(one)(gates, inputs)

    return apply


def _owners(base, groups) -> dict[str, str]:
    """Routed leaf -> router."""
    owners: dict[str, str] = {}
    for router, pattern in groups.items():
        found = [
            name
            for name, leaf in named_leaves(base).items()
            if tree.is_inexact(leaf) and re.search(pattern, name)
        ]
        if not found:
            shown = ", ".join(tree.paths(base)[:6])
            raise ValueError(
                f"upscale: {pattern!r} of {router!r} finds no floating leaf, such as "
                f"{shown}"
            )
        for name in found:
            if name in owners:
                raise ValueError(
                    f"upscale: {name!r} is routed by both {owners[name]!r} and "
                    f"{router!r}"
                )
            owners[name] = router
    if not owners:
        raise ValueError("upscale: groups are empty, wanted at least one")
    return owners
