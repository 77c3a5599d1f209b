"""Pruning and skipping of the experts of a mixture."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.layers.feed_forward import activation

_MOST_SUBSETS = 100_000


class PrunedExperts(NamedTuple):
    """Which experts to keep.

    Attributes:
      kept: [K] int32, ascending.
      losses: [C] float32, of every subset: how far outputs move without the others.
      subsets: [C, K] int32.
    """

    kept: chex.Array
    losses: chex.Array
    subsets: np.ndarray


def prune_experts(
    params: Mapping[str, Any],
    inputs: chex.Array,
    keep: int,
    *,
    top_k: int,
    normalize: bool = False,
    act: str = "silu",
) -> PrunedExperts:
    r"""Finds the experts of one layer without which its outputs change most.

      S = argmin over subsets of K experts  sum_b |F(X_b) - F_S(X_b)|_F

    where the router of F_S has the experts of S alone. Every subset is tried.

    Args:
      params: of one `layers.MixtureOfExperts`: {"router": {"kernel": [D, E]},
        "experts": {"gate", "in", "out": {"kernel"}}}.
      inputs: [S, N, D], what enters the layer: S batches of N tokens.
      keep: K, from `top_k` to E.
      top_k: of the layer.
      normalize: of the layer.
      act: of the layer, a name in `layers.ACTIVATIONS`.

    Returns:
      A `PrunedExperts`; see `take_experts`.

    Raises:
      ValueError: a number of experts out of its range, more than 100,000 subsets, or
        inputs of another width.

    Follows: Lu et al. 2024, "Not All Experts are Equal: Efficient Expert Pruning and
      Skipping for Mixture-of-Experts Large Language Models", and its released code,
      whose losses are norms, not squares.

    >>> from mtl_jax.models import layers
    >>> layer = layers.MixtureOfExperts(num_experts=3, top_k=1, hidden=4)
    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    >>> params = layer.init(jax.random.key(1), x)["params"]
    >>> prune_experts(params, x, 3, top_k=1).losses.tolist()
    [0.0]
    """
    width, count = params["router"]["kernel"].shape
    if not 1 <= top_k <= keep <= count:
        raise ValueError(
            f"prune_experts: keep is {keep} and top_k {top_k}, wanted "
            f"1 <= top_k <= keep <= {count}"
        )
    if inputs.ndim != 3 or inputs.shape[-1] != width:
        raise ValueError(
            f"prune_experts: inputs are {inputs.shape}, wanted [S, N, {width}]"
        )
    if math.comb(count, keep) > _MOST_SUBSETS:
        raise ValueError(
            f"prune_experts: {keep} of {count} experts are {math.comb(count, keep)} "
            f"subsets, of which at most {_MOST_SUBSETS} are tried"
        )
    subsets = np.array(list(itertools.combinations(range(count), keep)), np.int32)
    losses = _losses(params, inputs, subsets, top_k, normalize, act)
    return PrunedExperts(jnp.asarray(subsets)[jnp.argmin(losses)], losses, subsets)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _losses(params, inputs, subsets, top_k, normalize, act):
    kernels = {k: v["kernel"] for k, v in params["experts"].items()}
    count = params["router"]["kernel"].shape[-1]
    allowed = jax.nn.one_hot(subsets, count).sum(1) > 0

    def mix(logits, outputs, allowed):
        """[N, E], [N, E, D] -> [N, D]."""
        logits = jnp.where(allowed[None], logits, -jnp.inf)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), top_k)
        if normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        spread = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(chosen, count))
        return jnp.einsum("ne,ned->nd", spread, outputs)

    def batch(total, x):
        logits = (x @ params["router"]["kernel"].astype(x.dtype)).astype(jnp.float32)
        hidden = activation(act)(jnp.einsum("nd,edf->nef", x, kernels["gate"]))
        hidden = hidden * jnp.einsum("nd,edf->nef", x, kernels["in"])
        outputs = jnp.einsum("nef,efd->ned", hidden, kernels["out"])
        outputs = outputs.astype(jnp.float32)
        whole = mix(logits, outputs, jnp.ones(count, bool))

        def loss(allowed):
            return jnp.linalg.norm(whole - mix(logits, outputs, allowed))

        return total + jax.lax.map(loss, allowed), None

    kernels = jax.tree.map(lambda k: k.astype(inputs.dtype), kernels)
    return jax.lax.scan(batch, jnp.zeros(len(subsets)), inputs)[0]


def take_experts(params: Mapping[str, Any], kept: chex.Array) -> dict[str, Any]:
    """Parameters of a mixture with some of its experts.

    Args:
      params: see `prune_experts`; leading axes of scanned layers are allowed.
      kept: [K] integer, of each layer the same.

    Returns:
      Parameters for `num_experts` = K.

    >>> params = {"router": {"kernel": jnp.arange(6.0).reshape(2, 3)},
    ...           "experts": {"in": {"kernel": jnp.zeros((3, 2, 4))}}}
    >>> found = take_experts(params, jnp.array([0, 2]))
    >>> found["router"]["kernel"].tolist(), found["experts"]["in"]["kernel"].shape
    ([[0.0, 2.0], [3.0, 5.0]], (2, 2, 4))
    """
    return {
        "router": jax.tree.map(lambda x: x[..., kept], dict(params["router"])),
        "experts": jax.tree.map(
            lambda x: jnp.take(x, kept, axis=-3), dict(params["experts"])
        ),
    }


def skip_ratio(probabilities: chex.Array) -> chex.Array:
    """The `skip` of a layer that leaves out its second expert for half of the tokens.

    median over tokens of p_2 / p_1, of the two largest probabilities

    Args:
      probabilities: [..., E], of a router, as `layers.MixtureOfExperts` sows them.

    Returns:
      float32 scalar.

    Raises:
      ValueError: fewer than two experts.

    Follows: Lu et al. 2024, "Not All Experts are Equal", dynamic skipping.

    >>> skip_ratio(jnp.array([[0.5, 0.25, 0.25], [0.8, 0.2, 0.0], [0.5, 0.5, 0.0]]))
    Array(0.5, dtype=float32)
    """
    if probabilities.shape[-1] < 2:
        raise ValueError(
            f"skip_ratio: probabilities are {probabilities.shape}, wanted [..., E] of "
            "at least two experts"
        )
    top = jax.lax.top_k(probabilities.astype(jnp.float32), 2)[0]
    return jnp.median(top[..., 1] / top[..., 0])
