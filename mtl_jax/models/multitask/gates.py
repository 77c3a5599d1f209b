"""Mixtures of experts with gates per task: MMoE and DSelect-k."""

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.multitask.base import Factory, MultiTaskModule, flat, mix


class SoftGate(nn.Module):
    """softmax(x W): weights over N choices.

    Attributes:
      choices: N.
    """

    choices: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, ...]. Returns: [B, N] float32, rows sum to one."""
        logits = nn.Dense(self.choices, use_bias=False, name="logits")(flat(x))
        return jax.nn.softmax(logits, axis=-1)


class MMoE(MultiTaskModule, kw_only=True):
    """Experts that all tasks share, mixed by one gate per task.

      h = stem(x),   outputs_t = head_t(sum_e softmax(h W_t)_e expert_e(h))

    `z["shared"]` are the experts' outputs, [B, E, ...]; `z["gates"]` is [B, T, E].
    With one expert this is `HardSharing`.

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      expert: makes an expert; called `num_experts` times.
      num_experts: E.
      stem: makes what comes before experts and gates; None = experts and gates read
        the (single, flattened for the gates) input itself.

    **Follows**: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning
    with Multi-gate Mixture-of-Experts", eqs. 5-7.
    """

    expert: Factory
    num_experts: int = 4
    stem: Factory | None = None

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """Stem and experts."""
        return ("^experts_",) if self.stem is None else ("^trunk/", "^experts_")

    def setup(self):
        """Makes stem, experts, gates and heads."""
        if self.num_experts < 1:
            raise ValueError(
                f"{type(self).__name__}: num_experts wants at least 1, found "
                f"{self.num_experts}"
            )
        if self.stem is not None:
            self.trunk = self.stem()
        self.experts = [self.expert() for _ in range(self.num_experts)]
        self.gates = {name: self._make_gate() for name in self.outputs}
        self.heads = self._make_heads()

    def _make_gate(self) -> nn.Module:
        return SoftGate(self.num_experts)

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Args: what stem or experts take. Returns: {"shared", "gates"}."""
        h = run_stem(self, inputs, options)
        gates = [self.gates[name](h) for name in self.outputs]
        experts = [expert(h) for expert in self.experts]
        return {"shared": jnp.stack(experts, 1), "gates": jnp.stack(gates, 1)}

    def feature(self, z, task: int) -> chex.Array:
        """The task's mixture of experts."""
        return mix(z["gates"][:, task], z["shared"])


def run_stem(module: Any, inputs: tuple, options: dict[str, Any]) -> chex.Array:
    """The trunk's output, or the single input where there is no trunk."""
    if module.stem is not None:
        return module.trunk(*inputs, **options)
    if len(inputs) != 1 or options:
        raise ValueError(
            f"{type(module).__name__}: {len(inputs)} inputs and options "
            f"{sorted(options)} need a stem that takes them"
        )
    return inputs[0]


def smooth_step(t: chex.Array, gamma: float = 1.0) -> chex.Array:
    r"""A step from 0 to 1 that is constant outside |t| < gamma / 2 and smooth inside.

      S(t) = -2 / gamma^3 t^3 + 3 / (2 gamma) t + 1/2     for |t| <= gamma / 2

    Args:
      t: any shape.
      gamma: width of the step, positive.

    Returns:
      Like t, in [0, 1]; S(t) + S(-t) = 1.

    **Follows**: Hazimeh et al. 2021, "DSelect-k", eq. 2.

    >>> smooth_step(jnp.array([-0.5, 0.0, 0.25, 0.5])).tolist()
    [0.0, 0.5, 0.84375, 1.0]
    """
    if not gamma > 0:
        raise ValueError(f"smooth_step: gamma wants a positive number, found {gamma}")
    t = jnp.clip(t, -gamma / 2, gamma / 2)
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5


def code_weights(bits: chex.Array, choices: int) -> chex.Array:
    """Weights over choices from soft binary codes.

      r_n = prod_j (bits_j if bit j of n is set else 1 - bits_j)

    Args:
      bits: [..., M], in [0, 1].
      choices: N <= 2^M.

    Returns:
      [..., N]; sums to one where N = 2^M.
    """
    codes = (np.arange(choices)[:, None] >> np.arange(bits.shape[-1])) & 1
    codes = jnp.asarray(codes.astype(bool)).reshape(
        *(1,) * (bits.ndim - 1), choices, bits.shape[-1]
    )
    bits = bits[..., None, :]
    return jnp.prod(jnp.where(codes, bits, 1 - bits), axis=-1)


class SparseGate(nn.Module):
    """A sparse gate: k selectors, each a soft binary code, mixed by a softmax.

      r^i = code_weights(smooth_step(z^i)),    g = sum_i softmax(w)_i r^i

    Where every |z| reaches gamma / 2 each selector picks one choice. The collection
    "losses" receives two penalties, weighted means over the batch, for the caller to
    add to the loss: `selector_entropy`, sum_i H(r^i), which drives the codes to 0 and
    1, and, if N is no power of two, `selector_outside`, sum_i 1 / sum_n r^i_n, which
    keeps weight away from codes that stand for nothing. A single choice is always made,
    without parameters or penalties.

    Attributes:
      choices: N.
      k: selectors: at most k choices have weight at the end.
      gamma: width of the smooth step.
      per_example: z and w are linear in x; otherwise they are parameters and the
        same for all rows.
      entropy: weight of `selector_entropy`.
      outside: weight of `selector_outside`.
    """

    choices: int
    k: int = 2
    gamma: float = 1.0
    per_example: bool = False
    entropy: float = 1.0
    outside: float = 1.0

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, ...]. Returns: [B, N] float32."""
        if self.choices == 1:
            return jnp.ones((x.shape[0], 1), jnp.float32)
        bits = math.ceil(math.log2(self.choices))
        near_zero = _symmetric_uniform(self.gamma / 100)
        if self.per_example:
            h = flat(x)
            codes = nn.Dense(
                self.k * bits,
                use_bias=False,
                kernel_init=_symmetric_uniform(self.gamma / 100),
                name="codes",
            )(h)
            logits = nn.Dense(self.k, use_bias=False, name="logits")(h)
        else:
            codes = self.param("codes", near_zero, (self.k * bits,))[None]
            logits = self.param("logits", nn.initializers.zeros, (self.k,))[None]
        codes = codes.reshape(-1, self.k, bits)
        selectors = code_weights(smooth_step(codes, self.gamma), self.choices)
        self._penalise(selectors)
        share = jax.nn.softmax(logits, axis=-1)
        gate = jnp.einsum("bk,bkn->bn", share, selectors)
        return jnp.broadcast_to(gate, (x.shape[0], self.choices))

    def _penalise(self, selectors: chex.Array) -> None:
        """Sows the penalties of [B, k, N]."""
        log = jnp.log(jnp.where(selectors > 0, selectors, 1))
        entropy = -jnp.sum(selectors * log, axis=(1, 2))
        self.sow("losses", "selector_entropy", self.entropy * jnp.mean(entropy))
        if self.choices & (self.choices - 1):
            inside = jnp.sum(selectors, axis=-1)
            inverse = 1 / jnp.maximum(inside, 1e-6)
            outside = jnp.mean(jnp.sum(inverse, axis=-1))
            self.sow("losses", "selector_outside", self.outside * outside)


def _symmetric_uniform(bound: float):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class DSelectK(MMoE, kw_only=True):
    """Mixture of experts whose gates come to select at most k experts per task.

    As `MMoE`, with `SparseGate`s; see there for the two penalties. The selection is
    continuously differentiable, unlike that of top-k gates.

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      expert: makes an expert; called `num_experts` times.
      num_experts: E.
      stem: as in `MMoE`.
      k: at most this many experts per task.
      gamma: width of the smooth step.
      per_example: gates that depend on the input.
      entropy: weight of the penalty that makes gates choose; the paper tunes it.
      outside: weight of the penalty on codes that stand for no expert.

    **Follows**: Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the
    Mixture of Experts with Applications to Multi-Task Learning", sections 3.2-3.3
    and appendix on numbers of experts that are no power of two.
    **Differs**: the weights of the penalties are our choice, small beside the losses.
    """

    k: int = 2
    gamma: float = 1.0
    per_example: bool = False
    entropy: float = 0.01
    outside: float = 0.01

    def _make_gate(self) -> nn.Module:
        return SparseGate(
            self.num_experts,
            self.k,
            self.gamma,
            self.per_example,
            self.entropy,
            self.outside,
        )
