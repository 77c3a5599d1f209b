"""Modules whose layers mix their weights, or experts, by what enters them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms import routing
from mtl_jax.transforms.adapters._nodes import copied, put

_ROUTER, _EXPERTS, _SMILE = "moe_router", "moe_experts", "smile_experts"


def apply_routed(
    module: nn.Module,
    routers: Mapping[str, Any],
    model: routing.Upscaled,
    *inputs: Any,
    mask: chex.Array | None = None,
    per: Literal["example", "batch"] = "example",
    select: int | None = None,
    **options: Any,
) -> Any:
    r"""Applies an upscaled module in which every router sees what enters its own part.

      g(x) = mean over tokens of router(x),   theta(x) = theta_0 + sum_t g_t(x) tau_t

    Routers and task vectors lie inside the parameters, so that scanned or recomputed
    layers see their own slices; there routers have the axes of the layers in front.

    Args:
      module: a Linen module.
      routers: {path of a submodule: see `routing.init_router`}; the submodule takes one
        array [B, ..., D] and returns one, and mixes examples in no other way.
      model: see `routing.upscale` or `routing.rank_one`; its groups are named by the
        same paths, and find leaves of that submodule alone.
      *inputs: of the module.
      mask: [B, L] non-zero = token; None = all tokens count.
      per: "example", weights of its own for each; "batch", the mean of their gates and
        one set of weights.
      select: experts that count for an input, see `routing.soft_top`; None = all.
      **options: keyword arguments of the call.

    Returns:
      What the module returns. Gradients reach the routers alone of what is in `model`.

    Raises:
      ValueError: routers that are not those of the model, a group with leaves outside
        of its submodule, a submodule that this call does not reach or that takes more
        than one array, or a mode that does not exist.

    Follows: Tang et al. 2024, "Merging Multi-Task Models via Weight-Ensembling Mixture
      of Experts".

    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(4, 2))
    >>> x = jnp.ones((3, 5))
    >>> base = mlp.init(jax.random.key(0), x)["params"]
    >>> taus = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), base)
    >>> model = routing.upscale(base, taus, {"layers_0": "^layers_0/"})
    >>> routers = {"layers_0": routing.init_router(jax.random.key(1), 5, 2)}
    >>> apply_routed(mlp, routers, model, x).shape
    (3, 2)
    """
    if per not in ("example", "batch"):
        raise ValueError(f"apply_routed: per is {per!r}, wanted 'example' or 'batch'")
    params = _spliced(routers, jax.lax.stop_gradient(model))

    def own(layer, found, args, kwargs):
        experts = found.pop(_EXPERTS)
        gates_of = found.pop(_ROUTER)
        if len(args) != 1:
            raise ValueError(
                f"apply_routed: {'/'.join(layer.path)!r} takes {len(args)} arguments, "
                "wanted one"
            )
        gates = routing.mean_gates(gates_of, args[0], mask)
        alone = layer.clone(parent=None, name=None)

        def call(params, x):
            return alone.apply({"params": params}, x, **kwargs)

        def merge(gates):
            return routing.mixed(found, experts, gates)

        if per == "batch":
            gates = gates.mean(0)
        if select is not None:
            gates = routing.soft_top(gates, select)
        if per == "batch":
            return call(merge(gates), *args)
        return routing.per_example(call, merge)(gates, *args)

    out, seen = _intercepted(module, params, _ROUTER, own, inputs, options)
    if missed := sorted(set(routers) - seen):
        raise ValueError(
            f"apply_routed: the call reaches no module {missed[0]!r}; routers are of "
            f"{sorted(routers)}"
        )
    return out


def apply_smile(
    module: nn.Module,
    params: Mapping[str, Any],
    experts: Mapping[str, Any],
    *inputs: Any,
    top_k: int = 1,
    seen: Callable[[str, chex.Array, Any], chex.Array] | None = None,
    **options: Any,
) -> Any:
    """Applies a module whose Dense layers ask the experts that their input belongs to.

    Args:
      module: a Linen module.
      params: its parameters: the base, or a base whose other leaves are merged.
      experts: see `routing.smile_experts`, of kernels of its `nn.Dense` layers.
      *inputs: of the module.
      top_k: experts that answer each token.
      seen: `seen(path, x, experts of that layer) -> x`, handed what enters every layer
        with experts, to look at it on the way.
      **options: keyword arguments of the call.

    Returns:
      What the module returns.

    Raises:
      ValueError: experts of a layer that is not there, or that no Dense layer of this
        call has read.

    Follows: Tang et al. 2024, "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts
      Construction From Pre-Trained Foundation Models".

    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(4, 2))
    >>> x = jnp.ones((3, 5))
    >>> base = mlp.init(jax.random.key(0), x)["params"]
    >>> taus = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), base)
    >>> experts = routing.smile_experts(taus, rank=2, gate_rank=2)
    >>> apply_smile(mlp, base, experts, x).shape
    (3, 2)
    """
    spliced, wanted = copied(params), set()
    for path in {name.rpartition("/")[0] for name in tree.paths(experts)}:
        layer = _at(experts, path)
        if (kernel := _at(params, f"{path}/kernel")) is None:
            raise ValueError(f"apply_smile: params have no '{path}/kernel'")
        found = (*layer["a"].shape[:-3], layer["a"].shape[-2], layer["b"].shape[-1])
        if found != kernel.shape:
            raise ValueError(
                f"apply_smile: '{path}/kernel' is {kernel.shape}, the experts are for "
                f"{found}"
            )
        put(spliced, [*path.split("/"), _SMILE], dict(layer))
        wanted.add(path)

    def own(layer, found, args, kwargs):
        experts = found.pop(_SMILE)
        if not isinstance(layer, nn.Dense):
            raise ValueError(
                f"apply_smile: {'/'.join(layer.path)!r} is a {type(layer).__name__}, "
                "wanted a Dense layer"
            )
        if seen is not None:
            args = (seen("/".join(layer.path), args[0], experts), *args[1:])
        alone = layer.clone(parent=None, name=None)
        out: Any = alone.apply({"params": found}, *args, **kwargs)
        more = routing.smile_dense(args[0].astype(out.dtype), experts, top_k=top_k)
        return out + more

    out, reached = _intercepted(module, spliced, _SMILE, own, inputs, options)
    if missed := sorted(wanted - reached):
        raise ValueError(
            f"apply_smile: no Dense layer of this call reads {missed[0]!r}"
        )
    return out


def _intercepted(
    module: nn.Module,
    params: Any,
    mark: str,
    own: Callable[[nn.Module, dict[str, Any], Any, Any], Any],
    inputs: Any,
    options: Any,
) -> tuple[Any, set[str]]:
    """The call with `own` in the place of submodules whose parameters bear a mark."""
    seen: set[str] = set()

    def intercept(call, args, kwargs, context):
        layer = context.module
        found = {}
        if context.method_name == "__call__" and layer.scope is not None:
            found = dict(layer.variables.get("params", {}))
        if mark not in found:
            return call(*args, **kwargs)
        seen.add("/".join(layer.path))
        return own(layer, found, args, kwargs)

    with nn.intercept_methods(intercept):
        return module.apply({"params": params}, *inputs, **options), seen


def _spliced(routers, model) -> dict[str, Any]:
    """Parameters with routers and task vectors in the nodes of routed modules."""
    if set(routers) != set(model.experts):
        raise ValueError(
            f"apply_routed: routers of {sorted(routers)}, the model has "
            f"{sorted(model.experts)}"
        )
    params = copied(model.params)
    for path, router in routers.items():
        node, own = _at(params, path), model.experts[path]
        names = {name.removeprefix(f"{path}/") for name in own}
        if not isinstance(node, Mapping) or not names <= set(tree.paths(node)):
            raise ValueError(
                f"apply_routed: the group {path!r} has leaves {sorted(own)[:4]}, "
                "wanted those of the module of that path"
            )
        front = router["bias"].ndim - 1
        experts: dict[str, Any] = {}
        for name, x in own.items():
            parts = name.removeprefix(f"{path}/").split("/")
            moved = jax.tree.map(functools.partial(_task_axis_at, front), x)
            put(experts, parts, moved)
        values = {_ROUTER: dict(router), _EXPERTS: experts}
        put(params, path.split("/"), values)
    return params


def _task_axis_at(front, x):
    return jnp.moveaxis(x, 0, front)


def _at(params, path: str) -> Any:
    """What lies at a path, or None."""
    for part in path.split("/"):
        if not isinstance(params, Mapping) or part not in params:
            return None
        params = params[part]
    return params
