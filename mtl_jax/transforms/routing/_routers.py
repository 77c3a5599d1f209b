"""Small networks from features to one gate per task."""

import zlib
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax.transforms.merging import _spectral


def init_router(
    key: chex.PRNGKey,
    width: int,
    tasks: int,
    *,
    depth: int = 2,
    hidden: int | None = None,
    bias: float = 0.3,
    std: float = 0.01,
    lead: tuple[int, ...] = (),
) -> dict[str, Any]:
    r"""Parameters of a router whose gates start near one number.

    Args:
      key: typed PRNG key.
      width: D of its input.
      tasks: T.
      depth: 0, constant gates; 1, linear; 2, one hidden layer with ReLU.
      hidden: width of that; None for D.
      bias: what every gate starts at, but for the small random kernels.
      std: deviation of the kernels.
      lead: axes in front of every leaf, as (layers,) for scanned layers.

    Returns:
      {"bias": [..., T]}, and with a depth {"kernel": [..., D or H, T]}, and of a hidden
      layer {"hidden_kernel": [..., D, H], "hidden_bias": [..., H]}; float32.

    Raises:
      ValueError: a depth that does not exist, or no width or tasks.

    Follows: Tang et al. 2024, "Merging Multi-Task Models via Weight-Ensembling Mixture
      of Experts", and its released code.

    >>> params = init_router(jax.random.key(0), 4, 2, bias=0.25, std=0.0)
    >>> router(params, jnp.ones(4)).tolist()
    [0.25, 0.25]
    """
    if depth not in (0, 1, 2):
        raise ValueError(f"init_router: depth is {depth}, wanted 0, 1 or 2")
    hidden = width if hidden is None else hidden
    if min(width, tasks, hidden) < 1:
        raise ValueError(
            f"init_router: width is {width}, hidden {hidden}, tasks {tasks}, wanted at "
            "least 1"
        )
    params = {"bias": jnp.full((*lead, tasks), bias, jnp.float32)}
    keys = jax.random.split(key)

    def kernel(key, *shape):
        return std * jax.random.normal(key, (*lead, *shape), jnp.float32)

    if depth:
        params["kernel"] = kernel(keys[0], hidden if depth == 2 else width, tasks)
    if depth == 2:
        params["hidden_kernel"] = kernel(keys[1], width, hidden)
        params["hidden_bias"] = jnp.zeros((*lead, hidden), jnp.float32)
    return params


def init_routers(
    key: chex.PRNGKey, names: Iterable[str], width: int, tasks: int, **options: Any
) -> dict[str, Any]:
    """One router per name, each from a key that only its name decides.

    Args:
      key: typed PRNG key.
      names: such as those of `Upscaled.experts`.
      width: see `init_router`.
      tasks: see `init_router`.
      **options: see `init_router`.

    Returns:
      {name: parameters}.

    >>> sorted(init_routers(jax.random.key(0), ["a", "b"], 4, 2))
    ['a', 'b']
    """
    return {
        name: init_router(
            jax.random.fold_in(key, zlib.crc32(name.encode())), width, tasks, **options
        )
        for name in names
    }


def router(params: Any, x: chex.Array) -> chex.Array:
    """Gates, `relu(x K_h + b_h) K + b`, or fewer layers, as `params` have them.

    Args:
      params: see `init_router`, without axes in front.
      x: [..., D] floating point.

    Returns:
      [..., T] float32; not normalised.

    Raises:
      ValueError: features of another width.

    >>> router({"bias": jnp.array([0.5, 1.0])}, jnp.ones((3, 4))).shape
    (3, 2)
    """
    x = x.astype(jnp.float32)
    for part in ("hidden_", ""):
        if (kernel := params.get(f"{part}kernel")) is None:
            continue
        if x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"router: features are {x.shape}, wanted [..., {kernel.shape[0]}]"
            )
        bias = jnp.broadcast_to(params[f"{part}bias"], (*x.shape[:-1], kernel.shape[1]))
        x = _spectral.matmul(x, kernel) + bias
        x = jax.nn.relu(x) if part else x
    if "kernel" not in params:
        x = jnp.broadcast_to(params["bias"], (*x.shape[:-1], *params["bias"].shape))
    return x


def mean_gates(
    params: Any, x: chex.Array, mask: chex.Array | None = None
) -> chex.Array:
    """One row of gates per example: those of its tokens, averaged.

    Args:
      params: of a `router`.
      x: [B, ..., D], any number of token axes.
      mask: [B, ...] of those axes, non-zero = counts; None = all.

    Returns:
      [B, T] float32. An example without tokens has gates of 0.

    Raises:
      ValueError: a mask that does not fit.

    Follows: the released code of WEMoE, which averages gates, not features.
    Differs: padding can be left out.

    >>> params = {"bias": jnp.zeros(1), "kernel": jnp.ones((1, 1))}
    >>> x = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> mean_gates(params, x, jnp.array([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    gates = router(params, x)
    if mask is None:
        return gates.reshape(x.shape[0], -1, gates.shape[-1]).mean(1)
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mean_gates: mask is {mask.shape}, wanted {x.shape[:-1]}")
    count = mask.reshape(x.shape[0], -1).astype(jnp.float32)
    total = jnp.einsum(
        "bl,blt->bt",
        count,
        gates.reshape(*count.shape, -1),
        precision="highest",
    )
    return total / jnp.maximum(count.sum(1), 1)[:, None]


def soft_top(gates: chex.Array, count: int) -> chex.Array:
    """Leaves the largest gates, and brings the others close to 0, with slopes.

    g_e sigmoid(100 (g_e - the `count`-th largest))

    Args:
      gates: [..., E].
      count: how many stay, 1 to E; the last of them is halved.

    Returns:
      [..., E].

    Raises:
      ValueError: a count outside of 1 to E.

    Follows: the released code of the rank-one mixture of FusionBench; see `rank_one`.

    >>> soft_top(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
    [3.0, 0.0, 1.0]
    """
    if not 1 <= count <= gates.shape[-1]:
        raise ValueError(f"soft_top: count is {count}, wanted 1 to {gates.shape[-1]}")
    least = jax.lax.top_k(gates, count)[0][..., -1:]
    return gates * jax.nn.sigmoid(100 * (gates - least))
