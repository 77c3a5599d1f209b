"""Gates over adapters: Arrow, Poly and X-LoRA."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import number
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.adapters._nodes import factors, put
from mtl_jax.transforms.merging._lora_merge import shortened
from mtl_jax.transforms.routing._routers import router


def arrow_experts(
    loras: Sequence[Any],
    *,
    alpha: float,
    rslora: bool = False,
    temperature: float = 1.0,
    check_finite: bool = True,
) -> dict[str, Any]:
    r"""Experts of adapters whose gates are the directions that each moves most.

      v_t = the first left singular vector of a_t b_t [in, out]
      w   = softmax_t |v_t^T x| / temperature,   the largest, divided by their sum

    Args:
      loras: T adapters of the same kernels and ranks, {"a": [..., in, r], "b":
        [..., r, out]}.
      alpha: of all, see `adapters.lora.scale`.
      rslora: see there.
      temperature: above 0.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      What `smile_experts` returns, {"gate": [..., T, in, 1], "a", "b"} at the layer of
      every kernel: for `models.apply_smile` and `smile_dense`, whose `top_k` is 3 in
      the released code. The scale is in b, the temperature in the gates.

    Raises:
      ValueError: no adapters, different ones, one of what is no `kernel`, a temperature
        that is not positive, or NaN or infinity.

    Follows: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a
      Library of LoRAs".

    >>> adapter = {"dense": {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}}
    >>> found = arrow_experts([adapter, adapter], alpha=1.0)["dense"]
    >>> {name: x.shape for name, x in sorted(found.items())}
    {'a': (2, 3, 1), 'b': (2, 1, 2), 'gate': (2, 3, 1)}
    """
    loras = list(loras)
    if not loras:
        raise ValueError("arrow_experts: no adapters, wanted at least one")
    if not number("arrow_experts", "temperature", temperature) > 0:
        raise ValueError(f"arrow_experts: temperature is {temperature}, wanted above 0")
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"arrow_experts: adapter {t}", each)
    out: dict[str, Any] = {}
    for name, (a, b) in factors("stack", lora.stack(loras)).items():
        node, _, last = name.rpartition("/")
        if last != "kernel" or not node:
            raise ValueError(
                f"arrow_experts: {name!r} is adapted, wanted kernels of dense layers"
            )
        wide = tree.wide_dtype(a.dtype)
        pair = shortened({"a": a.astype(wide), "b": b.astype(wide)}, 1)
        length = jnp.linalg.norm(pair["a"], axis=-2, keepdims=True)
        gate = pair["a"] / jnp.where(length > 0, length, 1) / temperature
        scale = lora.scale(a.shape[-1], alpha, rslora=rslora)
        parts = {"gate": gate, "a": a, "b": b * jnp.asarray(scale, b.dtype)}
        moved = {k: jnp.moveaxis(x.astype(a.dtype), 0, -3) for k, x in parts.items()}
        put(out, node.split("/"), moved)
    return out


def low_rank_mix(x: chex.Array, layer: Any, weights: chex.Array) -> chex.Array:
    """`sum_t w_t (x a_t) b_t`, of every token.

    Args:
      x: [..., in].
      layer: {"a": [T, in, r], "b": [T, r, out]}; other parts are not read.
      weights: [..., T].

    Returns:
      [..., out] in the dtype of x, by two matrix products over all ranks.

    >>> layer = {"a": jnp.ones((2, 3, 1)), "b": jnp.ones((2, 1, 4))}
    >>> low_rank_mix(jnp.ones(3), layer, jnp.array([1.0, 0.5])).tolist()
    [4.5, 4.5, 4.5, 4.5]
    """
    inner = jnp.einsum("...i,tir->...tr", x, layer["a"].astype(x.dtype))
    inner = inner * weights.astype(x.dtype)[..., None]
    return jnp.einsum("...tr,tro->...o", inner, layer["b"].astype(x.dtype))


def poly_weights(
    logits: chex.Array,
    key: chex.PRNGKey | None = None,
    *,
    temperature: float = 1.0,
) -> chex.Array:
    r"""Weights of skills of a task, each taken or not, and those taken equal in sum.

      z = sigmoid((logits + noise) / temperature),   w = z / sum z

    Args:
      logits: [..., S], learned, of one task; leading axes are splits or layers.
      key: of the noise of training, logistic; None = none, and no temperature.
      temperature: of the relaxed Bernoulli variables, above 0.

    Returns:
      [..., S], on the simplex: for `adapters.lora.combine` or `low_rank_mix`.

    Raises:
      ValueError: a temperature that is not positive.

    Follows: Ponti et al. 2023, "Combining Parameter-efficient Modules for Task-level
      Generalisation", and its released code.

    >>> poly_weights(jnp.array([0.0, 0.0, -30.0])).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    if not number("poly_weights", "temperature", temperature) > 0:
        raise ValueError(f"poly_weights: temperature is {temperature}, wanted above 0")
    if key is not None:
        noise = jax.random.logistic(key, logits.shape, logits.dtype)
        logits = (logits + noise) / temperature
    # In logarithms, so that a task without any skill has the nearest ones.
    return jax.nn.softmax(jax.nn.log_sigmoid(logits))


def x_lora_gates(
    params: Any,
    hidden: chex.Array,
    layers: int,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> chex.Array:
    r"""Weights of adapters for every token and layer, from a pass without adapters.

      w = softmax_t router(hidden) / temperature

    Args:
      params: see `init_router`, with layers T gates, those of a layer next to each
        other.
      hidden: [..., D], last hidden states of the model without its adapters.
      layers: how many layers have gates.
      top_k: adapters that are left; None = all. They are not divided by their sum.
      temperature: above 0.

    Returns:
      [..., layers, T] float32, for `low_rank_mix`.

    Raises:
      ValueError: gates that are no multiple of the layers, a `top_k` outside of 1 to T,
        or a temperature that is not positive.

    Follows: Buehler and Buehler 2024, "X-LoRA: Mixture of Low-Rank Adapter Experts",
      and the released code, whose classifier is linear by default.

    >>> params = {"bias": jnp.array([0.0, 0.0, 0.0, 9.0])}
    >>> x_lora_gates(params, jnp.ones((1, 2)), 2).round(2).tolist()
    [[[0.5, 0.5], [0.0, 1.0]]]
    """
    if not number("x_lora_gates", "temperature", temperature) > 0:
        raise ValueError(f"x_lora_gates: temperature is {temperature}, wanted above 0")
    gates = router(params, hidden)
    if layers < 1 or gates.shape[-1] % layers:
        raise ValueError(
            f"x_lora_gates: the router has {gates.shape[-1]} gates, wanted a multiple "
            f"of the {layers} layers"
        )
    gates = gates.reshape(*gates.shape[:-1], layers, -1)
    weights = jax.nn.softmax(gates / temperature)
    if top_k is None:
        return weights
    if not 1 <= top_k <= weights.shape[-1]:
        raise ValueError(
            f"x_lora_gates: top_k is {top_k}, wanted 1 to {weights.shape[-1]}"
        )
    return jnp.where(tree.top_mask(weights, top_k, rows=True), weights, 0)
