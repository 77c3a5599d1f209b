"""Data-adaptive weight ensembling: features from outside decide the weights."""

from collections.abc import Callable
from typing import Any

import jax

from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.routing._routers import mean_gates
from mtl_jax.transforms.routing._upscale import gated, per_example
from mtl_jax.transforms.routing._we_moe import Per


def dawe(
    apply_fn: Callable[..., Any],
    features_fn: Callable[..., Any],
    *,
    per: Per = "example",
) -> Callable[..., Any]:
    r"""Applies an upscaled model of which one network for all parts sees the input.

      [g_1(x) ... g_M(x)] = router(features(x))
      theta_m(x) = theta_0 + sum_t g_m,t tau_m,t

    Args:
      apply_fn: `apply_fn(params, *inputs)`, inputs and outputs with leading axis B.
      features_fn: `features_fn(*inputs) -> [B, D] or [B, ..., D]`, of a model of its
        own, often a small one, which stays as it is.
      per: "example", weights of its own for each; "batch", the mean of their gates and
        one set of weights.

    Returns:
      `apply(router, model, *inputs)`: router see `init_router`, with T M gates, those
      of a task next to each other, in the order of the M names of groups; model see
      `upscale`. One group of all leaves is the task-wise mode of the paper's code, one
      group a leaf its layer-wise one. Gradients reach the router alone.

    Raises:
      ValueError: a mode that does not exist, a router that does not fit the model.

    Follows: DAWE in FusionBench (Tang et al. 2024, arXiv 2406.03280), where gates start
      at 0.2 and features are those of a small ResNet.

    >>> import jax.numpy as jnp
    >>> from mtl_jax.transforms.routing import upscale
    >>> base, taus = {"w": jnp.ones((1, 1))}, {"w": jnp.ones((2, 1, 1))}
    >>> model = upscale(base, taus, {"all": "w"})
    >>> router = {"bias": jnp.zeros(2), "kernel": jnp.ones((1, 2))}
    >>> apply = dawe(lambda p, x: x @ p["w"], lambda x: x)
    >>> apply(router, model, jnp.array([[1.0], [2.0]])).tolist()
    [[3.0], [10.0]]
    """
    _compose.choice("dawe", "per", per, ("example", "batch"))

    def apply(router, model, *inputs):
        model = jax.lax.stop_gradient(model)
        features = jax.lax.stop_gradient(features_fn(*inputs))
        codes = mean_gates(router, features)
        if per == "batch":
            return apply_fn(gated(model, _gates(model, codes.mean(0))), *inputs)
        merge = per_example(apply_fn, lambda code: gated(model, _gates(model, code)))
        return merge(codes, *inputs)

    return apply


def _gates(model, code):
    """[T M] -> {group: [T]}."""
    names = sorted(model.experts)
    if code.size % len(names):
        raise ValueError(
            f"dawe: the router has {code.size} gates, wanted a multiple of the "
            f"{len(names)} groups of the model"
        )
    rows = code.reshape(-1, len(names))
    return {name: rows[:, i] for i, name in enumerate(names)}
