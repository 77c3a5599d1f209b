"""How much the experts of every Dense layer are asked for."""

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.models.captures import row_weights, tap
from mtl_jax.models.routed import apply_smile
from mtl_jax.transforms import routing
from mtl_jax.transforms.adapters._nodes import copied, put

_LOAD, _ROWS = "load", "rows"


def smile_loads(
    module: nn.Module,
    params: Mapping[str, Any],
    experts: Mapping[str, Any],
    *inputs: Any,
    mask: chex.Array | None = None,
    top_k: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    r"""Mean weights that SMILE's gates give the experts of each layer.

      load_t = mean over tokens of w_t(x),   x as the routed layers below hand it on

    Args:
      module: a Linen module.
      params: see `apply_smile`.
      experts: see `routing.smile_experts`; of full rank where `merging.ada_svd` is to
        follow.
      *inputs: of the module.
      mask: [B, L] non-zero = the token counts; None = all do.
      top_k: experts that answer each token; None = all.
      **options: keyword arguments of the call.

    Returns:
      {layer: {leaf: [..., T]}} in nested dicts: for every leaf of a routed layer its
      loads, float32, which sum to 1; leading axes those of scanned layers. Of equally
      many tokens means may be averaged.

    Raises:
      ValueError: see `apply_smile`; no experts, or a mask that does not fit.

    Follows: the routing metric of AdaSVD in FusionBench (Tang et al. 2024,
      arXiv 2406.03280).

    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(4,))
    >>> x = jnp.ones((3, 5))
    >>> base = mlp.init(jax.random.key(0), x)["params"]
    >>> taus = jax.tree.map(lambda p: jnp.stack([p, p]), base)
    >>> experts = routing.smile_experts(taus, rank=4, gate_rank=2)
    >>> smile_loads(mlp, base, experts, x)["layers_0"]["kernel"].tolist()
    [0.5, 0.5]
    """
    layers = {name.rpartition("/")[0] for name in tree.paths(experts)}
    if not layers:
        raise ValueError("smile_loads: there are no experts")
    shapes = {name: _node(experts, name)["gate"].shape for name in layers}
    probes = {
        name: {
            _LOAD: jnp.zeros((*s[:-3], s[-3]), jnp.float32),
            _ROWS: jnp.zeros(s[:-3], jnp.float32),
        }
        for name, s in shapes.items()
    }
    count = next(iter(shapes.values()))[-3]

    def seen(layer, x, own):
        weight = row_weights("smile_loads", layer, x, mask)
        gates = routing.smile_gates(x, own["gate"], top_k=top_k or count)
        total = jnp.tensordot(weight, gates, weight.ndim)
        return tap(x, (own[_LOAD], own[_ROWS]), (total, weight.sum()))

    def result(probes):
        spliced = copied(experts)
        for name, own in probes.items():
            put(spliced, name.split("/"), own)
        outputs = apply_smile(
            module, params, spliced, *inputs, top_k=top_k or count, seen=seen, **options
        )
        found = [x for x in jax.tree.leaves(outputs) if tree.is_inexact(x)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in found)

    out: dict[str, Any] = {}
    for name, own in jax.grad(result)(probes).items():
        load = own[_LOAD] / jnp.maximum(own[_ROWS], 1)[..., None]
        put(out, name.split("/"), dict.fromkeys(_node(params, name), load))
    return out


def _node(found, name):
    for part in name.split("/"):
        found = found[part]
    return found
