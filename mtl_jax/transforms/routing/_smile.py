"""SMILE: low-rank experts whose singular vectors are their routers; no training."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.adapters._nodes import put
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.routing._lora_gates import low_rank_mix


def smile_experts(
    taus: Any,
    *,
    rank: int,
    gate_rank: int,
    matrices: _spectral.Matrices = None,
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> dict[str, Any]:
    r"""Experts and gates of every dense layer, from the SVD of its task vectors.

      tau_t = V S U^T      [in, out], as Flax has kernels
      gate_t = V[:, :gate_rank],   a_t = (V S)[:, :rank],   b_t = U[:, :rank]^T

    Args:
      taus: task tree, leaves [T, ...]; kernels of dense layers are named `kernel`.
      rank: of the experts; more than there is are zeros.
      gate_rank: directions that a gate looks at.
      matrices: which leaves are kernels, (name, shape) -> bool, in the last two axes,
        those before them batched; None: leaves of exactly two axes named `kernel`.
      svd: how singular vectors are found, see `merging.tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Nested dict by parts of names: at each kernel's layer {"gate": [..., T, in, g],
      "a": [..., T, in, r], "b": [..., T, r, out]} and, where the layer has a bias,
      {"bias": [..., T, out]}, in the dtypes of `taus`.

    Raises:
      ValueError: ranks below 1, no kernel, or NaN or infinity.

    Follows: Tang et al. 2024, "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts
      Construction From Pre-Trained Foundation Models", and its released code.

    >>> taus = {"dense": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}
    >>> found = smile_experts(taus, rank=2, gate_rank=1)["dense"]
    >>> {name: x.shape for name, x in sorted(found.items())}
    {'a': (2, 3, 2), 'b': (2, 2, 4), 'bias': (2, 4), 'gate': (2, 3, 1)}
    """
    if min(rank, gate_rank) < 1:
        raise ValueError(
            f"smile_experts: rank is {rank}, gate_rank {gate_rank}, wanted at least 1"
        )
    _compose.choice("smile_experts", "svd", svd, _spectral.TOP_SVD)
    _compose.check_taus("smile_experts", taus, None, check_finite)
    named, out = named_leaves(taus), {}

    def kernel(name, shape):
        if matrices is None:
            return name.split("/")[-1] == "kernel" and len(shape) == 2
        return bool(matrices(name, shape))

    for name in _spectral.views("smile_experts", taus, kernel):
        node = name.rpartition("/")[0]
        found = _experts(named[name], rank, gate_rank, svd)
        if (bias := named.get(f"{node}/bias")) is not None:
            found["bias"] = jnp.moveaxis(bias, 0, -2)
        put(out, node.split("/"), found)
    if not out:
        raise ValueError("smile_experts: no leaf of taus is a kernel")
    return out


def smile_gates(x: chex.Array, gate: chex.Array, *, top_k: int = 1) -> chex.Array:
    r"""Weights of the experts for every token: where its norm lies.

      w = softmax_t |V_t^T x|,   the `top_k` largest, divided by their sum

    Args:
      x: [..., in], what enters the layer.
      gate: V, [T, in, g].
      top_k: experts that answer, 1 to T.

    Returns:
      [..., T] float32, of which `top_k` are not 0.

    Raises:
      ValueError: a `top_k` outside of 1 to T.

    Follows: Tang et al. 2024, "SMILE".

    >>> gate = jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])
    >>> smile_gates(jnp.array([[3.0, 0.1]]), gate).tolist()
    [[1.0, 0.0]]
    """
    count = gate.shape[0]
    if not 1 <= top_k <= count:
        raise ValueError(f"smile_gates: top_k is {top_k}, wanted 1 to {count}")
    wide = x.astype(jnp.float32), gate.astype(jnp.float32)
    seen = jnp.einsum("...i,tig->...tg", *wide, precision="highest")
    squares = jnp.sum(seen**2, -1)
    # The root has no slope at 0.
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    weights = jax.nn.softmax(norms)
    if top_k == count:
        return weights
    kept, index = jax.lax.top_k(weights, top_k)
    kept = kept / kept.sum(-1, keepdims=True)
    return jnp.einsum("...k,...kt->...t", kept, jax.nn.one_hot(index, count))


def smile_dense(x: chex.Array, layer: Any, *, top_k: int = 1) -> chex.Array:
    r"""What the experts add to the output of one dense layer.

      sum_t w_t(x) ((x a_t) b_t + bias_t)

    Every expert is evaluated, in two matrix products over all of their ranks.

    Args:
      x: [..., in], what enters the layer.
      layer: {"gate": [T, in, g], "a": [T, in, r], "b": [T, r, out]}, perhaps
        {"bias": [T, out]}; see `smile_experts`.
      top_k: see `smile_gates`.

    Returns:
      [..., out] in the dtype of x.

    Follows: Tang et al. 2024, "SMILE".

    >>> layer = {"gate": jnp.ones((1, 2, 1)), "a": jnp.ones((1, 2, 1)),
    ...          "b": jnp.ones((1, 1, 3))}
    >>> smile_dense(jnp.ones((4, 2)), layer).tolist()[0]
    [2.0, 2.0, 2.0]
    """
    weights = smile_gates(x, layer["gate"], top_k=top_k).astype(x.dtype)
    out = low_rank_mix(x, layer, weights)
    if "bias" in layer:
        out = out + jnp.einsum("...t,to->...o", weights, layer["bias"].astype(x.dtype))
    return out


def _experts(x, rank, gate_rank, method) -> dict[str, Any]:
    """[T, ..., in, out] -> parts [..., T, ...]."""
    wide = jnp.moveaxis(x, 0, -3).astype(tree.wide_dtype(x.dtype))
    most = min(max(rank, gate_rank), *wide.shape[-2:])
    v, s, ut = _spectral.svd(wide, most, method)
    spare = [(0, 0)] * (v.ndim - 2)

    def columns(y, count):
        y = y[..., :count]
        return jnp.pad(y, [*spare, (0, 0), (0, count - y.shape[-1])])

    a = columns(v * s[..., None, :], rank)
    b = _spectral.transpose(columns(_spectral.transpose(ut), rank))
    parts = {"gate": columns(v, gate_rank), "a": a, "b": b}
    return {name: part.astype(x.dtype) for name, part in parts.items()}
