"""A mixture of experts from dense models of one shape, without training."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.adapters._nodes import copied, put

_KERNELS = ("gate", "in", "out")


def prompt_gates(
    hidden: chex.Array,
    mask: chex.Array | None = None,
    *,
    reduce: Literal["last", "mean", "sum"] = "last",
    negative: chex.Array | None = None,
    negative_mask: chex.Array | None = None,
) -> chex.Array:
    """Directions by which each layer knows the prompts of one expert.

    Args:
      hidden: [layers, B, L, D], what enters each layer of the base for B prompts:
        `Decoder(...)(ids, return_hidden=True)[:-1]`, stacked; or its first entry alone
        for gates that know words.
      mask: [B, L] non-zero = token; None = all are.
      reduce: of a prompt "last", its last token, or "mean"; both are averaged over
        prompts. "sum" adds up all tokens of all of them.
      negative: prompts of others, subtracted.
      negative_mask: theirs.

    Returns:
      [layers, D] float32 of norm 1, or 0.

    Raises:
      ValueError: a reduction that does not exist, or shapes that do not fit.

    Follows: mergekit's mixtures ("hidden", "hidden_avg" and, by "sum" of embeddings,
      "cheap_embed").
    Differs: padding does not count, where mergekit averages it, or takes it for the
      last token.

    >>> prompt_gates(jnp.array([[[[1.0, 0.0], [0.0, 4.0]]]])).round(2).tolist()
    [[0.0, 1.0]]
    """
    if reduce not in ("last", "mean", "sum"):
        raise ValueError(
            f"prompt_gates: reduce is {reduce!r}, wanted 'last', 'mean' or 'sum'"
        )
    found = _reduced(hidden, mask, reduce)
    if negative is not None:
        found = found - _reduced(negative, negative_mask, reduce)
    length = jnp.linalg.norm(found, axis=-1, keepdims=True)
    return found / jnp.maximum(length, 1e-8)


def _reduced(hidden, mask, reduce):
    """[layers, B, L, D] -> [layers, D]."""
    if hidden.ndim != 4 or (mask is not None and mask.shape != hidden.shape[1:3]):
        raise ValueError(
            f"prompt_gates: hidden is {hidden.shape}, its mask "
            f"{None if mask is None else mask.shape}, wanted [layers, B, L, D], [B, L]"
        )
    hidden = hidden.astype(jnp.float32)
    shape = hidden.shape[1:3]
    counts = (jnp.ones(shape) if mask is None else mask != 0).astype(jnp.float32)
    if reduce == "last":
        last = jnp.max(jnp.where(counts > 0, jnp.arange(shape[1])[None], -1), 1)
        counts = jax.nn.one_hot(last, shape[1])
    if reduce != "sum":
        total = jnp.maximum(counts.sum(1, keepdims=True), 1)
        counts = counts / total / shape[0]
    return jnp.einsum("nbld,bl->nd", hidden, counts, precision="highest")


def assemble_experts(
    base: Mapping[str, Any], experts: Sequence[Mapping[str, Any]], gates: chex.Array
) -> dict[str, Any]:
    """Parameters of a decoder whose feed-forward layers are those of several models.

    Args:
      base: parameters of a dense `Decoder` with gated feed-forward layers without bias,
        scanned or not: it gives all that is not feed-forward.
      experts: E of the same shape.
      gates: [layers, E, D], what routers multiply their inputs with, as `prompt_gates`
        of each expert, stacked on axis 1; or random ones, where training follows.

    Returns:
      Parameters for the same `Decoder` with `num_experts` = E; `normalize_experts` is
      what mergekit's mixtures have. Routers are in the dtype of the base.

    Raises:
      ValueError: no experts, parameters unlike the base, no feed-forward layer of that
        kind, or gates that do not fit.

    Follows: mergekit's mixtures, after Komatsuzaki et al. 2023, "Sparse Upcycling".

    >>> mlp = {k: {"kernel": jnp.ones(s)} for k, s in
    ...        {"gate": (2, 3), "in": (2, 3), "out": (3, 2)}.items()}
    >>> base = {"layers_0": {"mlp": mlp}}
    >>> found = assemble_experts(base, [base, base], jnp.ones((1, 2, 2)))
    >>> found["layers_0"]["mlp"]["experts"]["out"]["kernel"].shape
    (2, 3, 2)
    """
    experts = list(experts)
    if not experts:
        raise ValueError("assemble_experts: no experts, wanted at least one")
    for t, each in enumerate(experts):
        tree.check_match("assemble_experts", base, each, other_name=f"expert {t}")
    out, places = copied(base), _places(base)
    counts = [node["in"]["kernel"].shape[0] if scan else 1 for _, node, scan in places]
    width = places[0][1]["in"]["kernel"].shape[-2]
    wanted = (sum(counts), len(experts), width)
    if gates.shape != wanted:
        raise ValueError(
            f"assemble_experts: gates are {gates.shape}, wanted {wanted}, "
            "[layers, E, D]"
        )
    ends = list(itertools.accumulate(counts))
    parts = jnp.split(gates, ends[:-1])
    for (path, node, scan), own in zip(places, parts, strict=True):
        own = jnp.swapaxes(own, -1, -2).astype(node["in"]["kernel"].dtype)
        stacked = {
            name: {
                "kernel": jnp.stack(
                    [_at(each, path)[name]["kernel"] for each in experts], -3
                )
            }
            for name in _KERNELS
        }
        router = {"kernel": own if scan else own[0]}
        _at(out, path[:-1]).pop(path[-1])
        put(out, list(path), {"router": router, "experts": stacked})
    return out


def _places(base) -> list[tuple[tuple[str, ...], Any, bool]]:
    """Path, parameters and whether they are scanned, of every feed-forward layer."""
    found = []
    for key in base:
        node = base[key].get("mlp") if isinstance(base[key], Mapping) else None
        if node is None or not (key == "layers" or key.startswith("layers_")):
            continue
        shapes = {k: tuple(v) for k, v in node.items() if isinstance(v, Mapping)}
        if shapes != dict.fromkeys(_KERNELS, ("kernel",)):
            raise ValueError(
                f"assemble_experts: '{key}/mlp' has {sorted(tree.paths(node))}, wanted "
                "kernels gate, in and out"
            )
        found.append(((key, "mlp"), node, node["in"]["kernel"].ndim == 3))
    if not found:
        raise ValueError(
            f"assemble_experts: base has {sorted(base)}, wanted layers with an 'mlp'"
        )
    # In the order of the layers: layers_2 before layers_10.
    return sorted(found, key=lambda place: (len(place[0][0]), place[0][0]))


def _at(params, path):
    for part in path:
        params = params[part]
    return params
