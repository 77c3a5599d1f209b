"""WEMoE: an input's own weights, mixed from task vectors by a router."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.routing._routers import mean_gates, soft_top
from mtl_jax.transforms.routing._upscale import gated, per_example

Per = Literal["example", "batch"]


def we_moe(
    apply_fn: Callable[..., Any],
    features_fn: Callable[..., Any],
    *,
    per: Per = "example",
    select: int | None = None,
) -> Callable[..., Any]:
    r"""Applies an upscaled model whose routers look at features of the input.

      g_m(x) = mean over tokens of router_m(features(x))      one router m per group
      theta_m(x) = theta_0 + sum_t g_m,t(x) tau_m,t

    Args:
      apply_fn: `apply_fn(params, *inputs)`, inputs and outputs with leading axis B.
      features_fn: `features_fn(params, *inputs) -> [B, D] or [B, ..., D]`, called with
        the leaves that are not routed merged, and the others those of the base.
      per: "example", weights of its own for each; "batch", the mean of their gates and
        one set of weights.
      select: experts that count for an input, see `soft_top`; None = all.

    Returns:
      `apply(routers, model, *inputs)`: routers {name: see `init_router`}, model see
      `upscale`. Gradients reach the routers alone. Learn them by `merging.learner` with
      the mean entropy of predictions on unlabelled inputs.

    Raises:
      ValueError: a mode that does not exist, routers that do not fit the model.

    Follows: Tang et al. 2024, "Merging Multi-Task Models via Weight-Ensembling Mixture
      of Experts".
    Differs: here all routers see one set of features, so that any model will do. In the
      paper each sees what enters its own MLP: see `models.apply_routed`.

    >>> import jax.numpy as jnp
    >>> from mtl_jax.transforms.routing import upscale
    >>> apply = we_moe(lambda p, x: x @ p["w"], lambda p, x: x)
    >>> model = upscale(
    ...     {"w": jnp.ones((1, 1))}, {"w": jnp.ones((2, 1, 1))}, {"all": "w"}
    ... )
    >>> routers = {"all": {"bias": jnp.zeros(2), "kernel": jnp.ones((1, 2))}}
    >>> apply(routers, model, jnp.array([[1.0], [2.0]])).tolist()
    [[3.0], [10.0]]
    """
    _compose.choice("we_moe", "per", per, ("example", "batch"))

    def apply(routers, model, *inputs):
        model = jax.lax.stop_gradient(model)
        features = jax.lax.stop_gradient(features_fn(model.params, *inputs))
        gates = {name: mean_gates(params, features) for name, params in routers.items()}
        if per == "batch":
            gates = jax.tree.map(lambda g: g.mean(0), gates)
        if select is not None:
            gates = jax.tree.map(lambda g: soft_top(g, select), gates)
        if per == "batch":
            return apply_fn(gated(model, gates), *inputs)
        return per_example(apply_fn, lambda gates: gated(model, gates))(gates, *inputs)

    return apply
