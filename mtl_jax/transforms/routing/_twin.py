"""Twin-Merging: what tasks share, and what each has beside it, compressed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms import merging
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.adapters._nodes import factors
from mtl_jax.transforms.merging import _compose, _spectral
from mtl_jax.transforms.routing._routers import mean_gates
from mtl_jax.transforms.routing._upscale import per_example


class Twin(NamedTuple):
    """Shared and exclusive knowledge of T tasks, as differences from one base.

    Attributes:
      shared: tree like the parameters.
      low_rank: exclusive matrices, leaves {"a": [T, ..., in, r], "b": [T, ..., r, out]}
        by parts of names; empty where nothing is compressed so.
      others: {name: [T, ...]}, exclusive leaves that are kept whole or thinned.
    """

    shared: Any
    low_rank: Any
    others: dict[str, chex.Array]


def twin(
    taus: Any,
    *,
    shared: Any = None,
    scale: float = 0.3,
    rank: int | None = None,
    density: float | None = None,
    matrices: _spectral.Matrices = None,
    svd: _spectral.TopSvd = "svd",
    check_finite: bool = True,
) -> Twin:
    r"""Splits task vectors into a shared one and the rest of each, compressed.

      shared = scale * sum_t tau_t      or as given
      v_t    = compress(tau_t - shared)

    Args:
      taus: task tree, leaves [T, ...].
      shared: a merged delta in the place of task arithmetic, scaled.
      scale: strength of task arithmetic.
      rank: keep so many singular triplets of each matrix of v_t; other leaves whole.
      density: keep the largest of v_t instead, leaf by leaf; vectors and scalars whole.
        Neither: keep all.
      matrices: which leaves are matrices, see `merging.lora_from_taus`.
      svd: how singular vectors are found, see `merging.tsv_merge`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      A `Twin`, in the dtypes of `taus`.

    Raises:
      ValueError: both a rank and a density, one out of range, a `shared` that does not
        fit, or NaN or infinity.

    Follows: Lu et al. 2024, "Twin-Merging: Dynamic Integration of Modular Expertise in
      Model Merging", and its released code.

    >>> taus = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    >>> model = twin(taus, scale=0.5)
    >>> model.shared["w"].tolist(), model.others["w"].tolist()
    ([0.5, 0.5], [[0.5, -0.5], [-0.5, 0.5]])
    """
    if rank is not None and density is not None:
        raise ValueError("twin: both rank and density are given, wanted one")
    _compose.check_taus("twin", taus, None, check_finite)
    if shared is None:
        total = tree.combine(taus, jnp.full(_count(taus), scale, jnp.float32))
        shared = total
    one = jax.eval_shape(lambda taus: jax.tree.map(lambda x: x[0], taus), taus)
    tree.check_match("twin", one, shared, other_name="shared", reference_name="a task")
    rest = jax.tree.map(_apart, taus, shared)
    low_rank, done = {}, set()
    if rank is not None:
        options = {"matrices": matrices, "svd": svd, "check_finite": False}
        try:
            loras = merging.lora_from_taus(rest, rank=rank, **options)
        except ValueError as error:
            raise ValueError(f"twin: {error}") from error
        low_rank = lora.stack(loras)
        done = set(factors("twin", low_rank))
    elif density is not None:
        masks = merging.magnitude_masks(
            rest, density=density, scope="leaf", check_finite=False
        )
        rest = jax.tree.map(
            lambda x, m: jnp.where(m, x, jnp.zeros_like(x)) if x.ndim > 2 else x,
            rest,
            masks,
        )
    named = named_leaves(rest)
    return Twin(shared, low_rank, {k: x for k, x in named.items() if k not in done})


def twin_delta(model: Twin, weights: chex.Array) -> Any:
    """Differences from the base for one weighting, `shared + sum_t w_t v_t`.

    Args:
      model: see `twin`.
      weights: [T].

    Returns:
      Tree like `model.shared`, in its dtypes; computed in float32, cast once.

    Raises:
      ValueError: weights that do not fit.

    >>> model = twin({"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])})
    >>> twin_delta(model, jnp.array([0.0, 1.0]))["w"].round(4).tolist()
    [0.0, 1.0]
    """
    count = _count((model.low_rank, model.others))
    weights = _compose.numbers("twin_delta", "weights", weights)
    if weights.shape != (count,):
        raise ValueError(f"twin_delta: weights are {weights.shape}, wanted ({count},)")
    moves = {}
    pairs = factors("twin_delta", model.low_rank) if model.low_rank else {}
    for name, (a, b) in pairs.items():
        # [T, ..., in, r] by weights, then one product over tasks and ranks.
        a = a.astype(jnp.float32)
        a = a * weights.reshape(-1, *[1] * (a.ndim - 1))
        axes = "tir,tro->io" if a.ndim == 3 else "t...ir,t...ro->...io"
        b = b.astype(jnp.float32)
        moves[name] = jnp.einsum(axes, a, b, precision="highest")
    for name, x in model.others.items():
        if tree.is_inexact(x):
            moves[name] = jnp.tensordot(weights, x.astype(jnp.float32), 1)

    def leaf(name, x):
        if name not in moves:
            return x
        return (x.astype(jnp.float32) + moves[name]).astype(x.dtype)

    return tree.map_with_path(leaf, model.shared)


def twin_apply(
    apply_fn: Callable[..., Any], features_fn: Callable[..., Any]
) -> Callable[..., Any]:
    r"""Applies to every example the shared model and what its router adds.

      w(x)     = softmax(router(features(x; base + shared)))
      theta(x) = base + shared + sum_t w_t(x) v_t

    Args:
      apply_fn: `apply_fn(params, *inputs)`, inputs and outputs with leading axis B.
      features_fn: `features_fn(params, *inputs) -> [B, D] or [B, ..., D]` of the shared
        model, as the last hidden states.

    Returns:
      `apply(router, model, base, *inputs)`, with a router of `init_router`, learned as
      a classifier of tasks: `routing.mean_gates` gives its logits.

    Follows: Lu et al. 2024, "Twin-Merging".
    Differs: the released router has two hidden layers, batch norm and dropout, and its
      features are averaged before it; a router here has one, and logits are averaged.

    >>> model = twin({"w": jnp.array([[[1.0]], [[3.0]]])}, scale=0.0)
    >>> apply = twin_apply(lambda p, x: x @ p["w"], lambda p, x: x)
    >>> router, one = {"bias": jnp.array([9.0, -9.0])}, jnp.ones((1, 1))
    >>> apply(router, model, {"w": one}, one).round(4).tolist()
    [[2.0]]
    """

    def apply(router, model, base, *inputs):
        model, base = jax.lax.stop_gradient((model, base))
        features = features_fn(tree.add_scaled(base, model.shared), *inputs)
        logits = mean_gates(router, jax.lax.stop_gradient(features))

        def merge(weights):
            return tree.add_scaled(base, twin_delta(model, weights))

        return per_example(apply_fn, merge)(jax.nn.softmax(logits), *inputs)

    return apply


def _count(taus) -> int:
    return tree.num_tasks("twin", taus)


def _apart(x, y):
    if not tree.is_inexact(x):
        return x
    wide = tree.wide_dtype(x.dtype)
    return (x.astype(wide) - y.astype(wide)[None]).astype(x.dtype)
