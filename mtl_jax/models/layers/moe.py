"""Mixture of gated feed-forward experts with a top-k router."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax.models.layers.feed_forward import activation

IMPLEMENTATIONS = (None, "dense", "sorted")
_INIT = nn.initializers.normal(0.02)


class ExpertKernels(NamedTuple):
    """Kernels of E experts: gate and in [E, D, F], out [E, F, D]."""

    gate: chex.Array
    into: chex.Array
    out: chex.Array


def apply_experts(
    x: chex.Array,
    weights: chex.Array,
    experts: chex.Array,
    kernels: ExpertKernels,
    act: str = "silu",
    implementation: str | None = None,
) -> chex.Array:
    """`sum_k weights[k] out_e(act(gate_e(x)) * in_e(x))` with `e = experts[k]`.

    "dense" runs every expert on every token. "sorted" groups the tokens by expert into
    blocks of one size and runs each block on its expert: no token is ever dropped,
    shapes do not depend on the routing, and the arithmetic is at most about twice
    what the routing asks for.

    Args:
      x: [N, D].
      weights: [N, k] floating point.
      experts: [N, k] integer, distinct in each row.
      kernels: of the experts.
      act: a name in `layers.ACTIVATIONS`.
      implementation: "dense", "sorted", or None for the one with less arithmetic.

    Returns:
      [N, D] in the dtype of x.

    Raises:
      ValueError: for another implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"apply_experts: implementation must be one of {IMPLEMENTATIONS}, is "
            f"{implementation!r}"
        )
    x, weights, experts, kernels = jax.tree.map(
        jnp.asarray, (x, weights, experts, kernels)
    )
    size, blocks = _block_sizes(experts.size, len(kernels.gate))
    if implementation is None:
        cheaper = 2 * size * blocks <= len(x) * len(kernels.gate)
        implementation = "sorted" if cheaper else "dense"
    run = {"dense": _dense, "sorted": _sorted}[implementation]
    return run(x, weights, experts, kernels, activation(act)).astype(x.dtype)


def _dense(x, weights, experts, kernels, act):
    chosen = jax.nn.one_hot(experts, len(kernels.gate), dtype=weights.dtype)
    combine = jnp.einsum("nk,nke->ne", weights, chosen).astype(x.dtype)
    hidden = act(jnp.einsum("nd,edf->nef", x, kernels.gate))
    hidden = hidden * jnp.einsum("nd,edf->nef", x, kernels.into)
    return jnp.einsum("nef,efd->nd", hidden * combine[:, :, None], kernels.out)


def _sorted(x, weights, experts, kernels, act):
    (tokens, width), top_k = x.shape, experts.shape[1]
    size, blocks = _block_sizes(experts.size, len(kernels.gate))
    flat = experts.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True)
    expert = flat[order]
    group = jnp.bincount(flat, length=len(kernels.gate)).astype(jnp.int32)
    used = (group + size - 1) // size
    first = (jnp.cumsum(used) - used) * size  # First row of each expert's blocks.
    rank = jnp.arange(len(flat), dtype=jnp.int32) - (jnp.cumsum(group) - group)[expert]
    row = first[expert] + rank
    source = jnp.full(blocks * size, tokens, jnp.int32)
    source = source.at[row].set(order.astype(jnp.int32) // top_k)
    padded = jnp.concatenate([x, jnp.zeros((1, width), x.dtype)])
    batch = padded[source].reshape(blocks, size, width)
    owner = jnp.repeat(
        jnp.arange(len(group), dtype=jnp.int32), used, total_repeat_length=blocks
    )
    hidden = act(jnp.einsum("bmd,bdf->bmf", batch, kernels.gate[owner]))
    hidden = hidden * jnp.einsum("bmd,bdf->bmf", batch, kernels.into[owner])
    out = jnp.einsum("bmf,bfd->bmd", hidden, kernels.out[owner])
    back = jnp.zeros_like(flat).at[order].set(row).reshape(tokens, top_k)
    picked = out.reshape(blocks * size, width)[back]
    return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), picked)


def _block_sizes(assignments, experts):
    """(rows of a block, blocks that suffice however the tokens fall)."""
    size = 1 << max(0, (assignments // experts).bit_length() - 1)
    groups = min(assignments, experts)
    return size, (assignments - groups) // size + groups


class MixtureOfExperts(nn.Module):
    """Each token goes to its `top_k` most probable experts.

    The router's probabilities [B, L, E] are sown as `router_probabilities` into
    "intermediates".

    Attributes:
      num_experts: E.
      top_k: k.
      hidden: width F of an expert.
      activation: a name in `layers.ACTIVATIONS`.
      normalize: let the k weights of a token sum to one.
      skip: experts whose probability is less than this times the largest are left out
        of a token, before weights are normalised; 0 = none. Shapes do not change, so
        no arithmetic is saved. See `models.skip_ratio`.
      implementation: see `apply_experts`.
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.

    **Follows**: Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language
    Models": softmax over all experts, then the top k. With
    `skip` Lu et al. 2024, "Not All Experts are Equal: Efficient Expert Pruning and
    Skipping for Mixture-of-Experts Large Language Models".
    """

    num_experts: int
    top_k: int
    hidden: int
    activation: str = "silu"
    normalize: bool = False
    skip: float = 0.0
    implementation: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: chex.Array, override: chex.Array | None = None) -> chex.Array:
        """Routes and mixes.

        Args:
          x: [B, L, D].
          override: [B, L, E] probabilities to route by in place of the router's;
            a token whose row is all zero keeps its own.

        Returns:
          [B, L, D].
        """
        logits = nn.Dense(
            self.num_experts,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
            name="router",
        )(x)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        if override is not None:
            given = jnp.any(override != 0, axis=-1, keepdims=True)
            probabilities = jnp.where(
                given, override.astype(jnp.float32), probabilities
            )
        self.sow("intermediates", "router_probabilities", probabilities)
        weights, experts = jax.lax.top_k(probabilities, self.top_k)
        if self.skip:
            weights = jnp.where(weights < self.skip * weights[..., :1], 0, weights)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        dtype = x.dtype if self.dtype is None else self.dtype
        kernels = _Experts(
            self.num_experts, self.hidden, self.param_dtype, name="experts"
        )(x.shape[-1])
        y = apply_experts(
            x.reshape(-1, x.shape[-1]).astype(dtype),
            weights.reshape(-1, self.top_k),
            experts.reshape(-1, self.top_k),
            ExpertKernels(*(kernel.astype(dtype) for kernel in kernels)),
            self.activation,
            self.implementation,
        )
        return y.reshape(x.shape)


class _Experts(nn.Module):
    num_experts: int
    hidden: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, width):
        inner = (self.num_experts, width, self.hidden)
        outer = (self.num_experts, self.hidden, width)
        shapes = {"gate": inner, "in": inner, "out": outer}
        return [
            _Kernel(shape, self.param_dtype, name=name)()
            for name, shape in shapes.items()
        ]


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self):
        return self.param("kernel", _INIT, self.shape, self.param_dtype)
