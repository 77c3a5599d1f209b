"""Low-rank adapters in parameter space: any framework, any pytree.

An adapter is a nested dict of the adapted leaves alone, by the parts of their names:
`{"layers_0": {"query": {"kernel": {"a": [..., in, r], "b": [..., r, out]}}}}`. Axes in
front of the last two of a leaf, such as that of scanned layers, stay in front.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.adapters._nodes import copied, factors, named_leaves, put
from mtl_jax.transforms.quantization import nf4

__all__ = [
    "combine",
    "delta",
    "init",
    "merge",
    "scale",
    "splice",
    "stack",
    "unmerge",
    "unstack",
]

INITS = ("kaiming", "gaussian")


def scale(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """The factor of an adapter's product: `alpha / r`, or `alpha / sqrt(r)`.

    Args:
      rank: r.
      alpha: numerator.
      rslora: divide by the square root.

    Returns:
      A Python float.

    >>> scale(16, 32.0), scale(16, 32.0, rslora=True)
    (2.0, 8.0)

    **Follows**: Hu et al. 2022, "LoRA", section 4.1; Kalajdzievski 2023, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def init(
    key: chex.PRNGKey,
    params: chex.ArrayTree,
    rules: Sequence[str] | Mapping[str, int],
    *,
    rank: int = 8,
    init: str = "kaiming",
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """A new adapter that changes nothing: `a` is random, `b` is zero.

      W' = W + s a b,   a: [in, r],   b: [r, out]

    Each leaf draws from its own key, made of `key` and its name, so that it starts the
    same whichever other leaves are adapted.

    Args:
      key: typed PRNG key.
      params: parameters or their shapes; a `quantization` leaf counts as the leaf it
        stands for.
      rules: regular expressions, searched in leaf names; a mapping gives the rank of
        what each finds, the first one that finds a leaf counting.
      rank: r, where `rules` give none.
      init: of `a`: "kaiming", uniform in +-1/sqrt(in), or "gaussian", N(0, 1/r^2).
      dtype: of the factors.

    Returns:
      Nested dict of the adapted leaves, each {"a", "b"}.

    Raises:
      ValueError: a rule that finds no leaf, a leaf that is no matrix or not floating
        point, or a rank that is not in 1 ... min(in, out).

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> adapter = init(jax.random.key(0), params, ["kernel$"], rank=2)
    >>> jax.tree.map(jnp.shape, adapter)
    {'dense': {'kernel': {'a': (4, 2), 'b': (2, 3)}}}

    **Follows**: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models",
    equation 3.

    **Differs**: `a` multiplies from the left, as kernels are [in, out] here; "kaiming"
    and "gaussian" are those of the PEFT library, the paper has "a random Gaussian".
    """
    if init not in INITS:
        raise ValueError(f"lora.init: init is {init!r}, wanted one of {INITS}")
    named = named_leaves(params)
    out: dict[str, Any] = {}
    for name, r in _ranks(named, rules, rank).items():
        leaf = named[name]
        _check_matrix(name, leaf, r)
        *lead, rows, columns = leaf.shape
        own = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        if init == "kaiming":
            bound = 1 / math.sqrt(rows)
            a = jax.random.uniform(
                own, (*lead, rows, r), jnp.float32, minval=-bound, maxval=bound
            )
        else:
            a = jax.random.normal(own, (*lead, rows, r), jnp.float32) / r
        b = jnp.zeros((*lead, r, columns), dtype)
        put(out, name.split("/"), {"a": a.astype(dtype), "b": b})
    return out


def delta(lora: Any, *, alpha: float, rslora: bool = False) -> dict[str, Any]:
    """What an adapter adds: `s a b` of every adapted leaf, in float32.

    Args:
      lora: an adapter, or several that are stacked.
      alpha: see `scale`.
      rslora: see `scale`.

    Returns:
      Nested dict of the adapted leaves, [..., in, out].

    Raises:
      ValueError: if `lora` is no adapter.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> delta(adapter, alpha=3.0)["w"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    out: dict[str, Any] = {}
    for name, (a, b) in factors("delta", lora).items():
        put(out, name.split("/"), _product(a, b, alpha, rslora))
    return out


def merge(
    params: chex.ArrayTree, lora: Any, *, alpha: float, rslora: bool = False
) -> chex.ArrayTree:
    """Parameters with the adapter in them: `W + s a b`.

    Inside a loss it applies the adapter to any model: differentiate with respect to
    `lora`. The product and the sum are float32, cast once.

    Args:
      params: parameters.
      lora: an adapter of theirs.
      alpha: see `scale`.
      rslora: see `scale`.

    Returns:
      Tree like `params`, in its dtypes.

    Raises:
      ValueError: an adapted leaf that `params` lack or that does not fit.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> merge({"w": jnp.ones((2, 2))}, adapter, alpha=0.5)["w"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    return _moved("merge", params, lora, alpha, rslora)


def unmerge(
    params: chex.ArrayTree, lora: Any, *, alpha: float, rslora: bool = False
) -> chex.ArrayTree:
    """The inverse of `merge`, up to rounding of the parameters' dtype.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> unmerge({"w": jnp.ones((2, 2))}, adapter, alpha=0.5)["w"].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    return _moved("unmerge", params, lora, -alpha, rslora)


def stack(loras: Sequence[Any]) -> Any:
    """T adapters of equal ranks as one bank: leaves [T, ..., in, r], [T, ..., r, out].

    Raises:
      ValueError: adapters of different leaves or ranks, by name.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> stack([adapter, adapter])["w"]["a"].shape
    (2, 2, 1)
    """
    for lora in loras:
        factors("stack", lora)
    return tree.stack(loras)


def unstack(bank: Any) -> list[Any]:
    """The adapters of a bank; the inverse of `stack`.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> len(unstack(stack([adapter, adapter])))
    2
    """
    return tree.unstack(bank)


def combine(
    loras: Sequence[Any],
    weights: Sequence[float] | chex.Array,
    *,
    alpha: float | Sequence[float],
    rslora: bool = False,
) -> Any:
    """One adapter whose product is the weighted sum of products, exactly.

      a = [a_1 ... a_T],   b = [w_1 s_1 b_1; ...; w_T s_T b_T]

    Sums of factors are no sums of products; this is one, of rank r_1 + ... + r_T.
    The scales are in it: use it with `alpha` = its rank, or with `rslora` the root.

    Args:
      loras: T adapters of the same leaves; ranks may differ.
      weights: [T].
      alpha: see `scale`; one for all, or one for each.
      rslora: see `scale`.

    Returns:
      An adapter with scale 1.

    Raises:
      ValueError: adapters of different leaves, or T weights that are not there.

    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> both = combine([adapter, adapter], [1.0, 0.5], alpha=1.0)
    >>> delta(both, alpha=2.0)["w"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    count = len(loras)
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * count
    if not count or len(weights) != count or len(alphas) != count:
        raise ValueError(
            f"lora.combine: {count} adapters with {len(weights)} weights and "
            f"{len(alphas)} alphas"
        )
    named = [factors("combine", lora) for lora in loras]
    for i, other in enumerate(named[1:], 1):
        if odd := sorted(set(other) ^ set(named[0])):
            raise ValueError(
                f"lora.combine: {odd[0]!r} is not adapted by both 0 and {i}"
            )
    out: dict[str, Any] = {}
    for name in named[0]:
        left, right = [], []
        for each, weight, own in zip(named, weights, alphas, strict=True):
            a, b = each[name]
            factor = scale(a.shape[-1], own, rslora=rslora)
            left.append(a)
            right.append((b * jnp.asarray(weight * factor, b.dtype)).astype(b.dtype))
        joined = {"a": jnp.concatenate(left, -1), "b": jnp.concatenate(right, -2)}
        put(out, name.split("/"), joined)
    return out


def splice(
    params: Mapping[str, Any],
    lora: Any,
    *,
    alpha: float,
    rslora: bool = False,
    index: chex.Array | None = None,
) -> dict[str, Any]:
    """Puts the factors beside the kernels that they adapt, for layers to read.

    The node of an adapted layer gets `lora_a` and `lora_b`, scaled, and with a bank
    `lora_index`. Because they lie inside the parameters, scanned layers see their own
    slices of them; see `models.apply_adapted`.

    Args:
      params: nested dicts whose adapted leaves are named `kernel`.
      lora: an adapter, or with `index` a bank of T, see `stack`.
      alpha: see `scale`.
      rslora: see `scale`.
      index: [B] integer, which adapter of the bank serves which example.

    Returns:
      Nested dict: `params` and, in the nodes of adapted kernels, the factors.

    Raises:
      ValueError: an adapted leaf that is absent, not named `kernel` or does not fit.

    >>> params = {"dense": {"kernel": jnp.ones((2, 2))}}
    >>> adapter = init(jax.random.key(0), params, ["kernel"], rank=1)
    >>> sorted(splice(params, adapter, alpha=1.0)["dense"])
    ['kernel', 'lora_a', 'lora_b']
    """
    named = named_leaves(params)
    out = copied(params)
    for name, (a, b) in factors("splice", lora).items():
        *node, last = name.split("/")
        if last != "kernel":
            raise ValueError(f"lora.splice: {name!r} is not named kernel; use merge")
        kernel = _adapted("splice", named, name)
        front = len(kernel.shape) - 2
        found = (*a.shape[:-1], b.shape[-1])
        bank = () if index is None else a.shape[:1]
        if found != (*bank, *kernel.shape):
            raise ValueError(
                f"lora.splice: {name!r} is {tuple(kernel.shape)}, the "
                f"{'adapter' if index is None else 'bank'} is for {found}"
            )
        b = b * jnp.asarray(scale(a.shape[-1], alpha, rslora=rslora), b.dtype)
        values = {"lora_a": a, "lora_b": b}
        if index is not None:  # Scanned layers lead, then the tasks.
            values = {k: jnp.moveaxis(v, 0, front) for k, v in values.items()}
            values["lora_index"] = jnp.broadcast_to(
                jnp.asarray(index), (*kernel.shape[:-2], *jnp.shape(index))
            )
        put(out, node, values)
    return out


def _ranks(named, rules, rank) -> dict[str, Any]:
    """Leaf name -> rank, in leaf order."""
    if isinstance(rules, str) or not rules:
        raise ValueError(f"lora.init: rules must be one or more regexes, are {rules!r}")
    table = dict(rules) if isinstance(rules, Mapping) else dict.fromkeys(rules, rank)
    for rule in table:
        if not any(re.search(rule, name) for name in named):
            shown = ", ".join(list(named)[:6])
            raise ValueError(
                f"lora.init: rule {rule!r} finds none of the {len(named)} leaves, such "
                f"as {shown}"
            )
    hits = {
        name: [r for rule, r in table.items() if re.search(rule, name)]
        for name in named
    }
    return {name: found[0] for name, found in hits.items() if found}


def _check_matrix(name, leaf, rank) -> None:
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"lora.init: {name!r} is {leaf.dtype}{list(leaf.shape)}, wanted a floating "
            "matrix [..., in, out]"
        )
    if not 1 <= rank <= min(leaf.shape[-2:]):
        raise ValueError(
            f"lora.init: rank {rank} for {name!r} of {tuple(leaf.shape)}, wanted 1 ... "
            f"{min(leaf.shape[-2:])}"
        )


def _product(a, b, alpha, rslora):
    wide = tree.wide_dtype(a.dtype)
    product = jnp.matmul(
        a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    return product * jnp.asarray(scale(a.shape[-1], alpha, rslora=rslora), wide)


def _moved(fn_name, params, lora, alpha, rslora):
    named = named_leaves(params)
    moves = {}
    for name, (a, b) in factors(fn_name, lora).items():
        leaf = _adapted(fn_name, named, name)
        if (*a.shape[:-1], b.shape[-1]) != tuple(leaf.shape):
            raise ValueError(
                f"lora.{fn_name}: {name!r} is {tuple(leaf.shape)}, the adapter is for "
                f"{(*a.shape[:-1], b.shape[-1])}"
            )
        moves[name] = a, b

    def move(path, leaf):
        if (name := tree.path_str(path)) not in moves:
            return leaf
        dtype = leaf.dtype
        if isinstance(leaf, nf4.Quantized):
            leaf = nf4.decode(leaf)
        a, b = moves[name]
        step = _product(a, b, alpha, rslora)
        wide = jnp.promote_types(tree.wide_dtype(leaf.dtype), step.dtype)
        return (leaf.astype(wide) + step.astype(wide)).astype(dtype)

    return jax.tree_util.tree_map_with_path(move, params, is_leaf=nf4.is_quantized)


def _adapted(fn_name, named, name):
    if name not in named:
        raise ValueError(f"lora.{fn_name}: the adapted {name!r} is not in params")
    return named[name]
