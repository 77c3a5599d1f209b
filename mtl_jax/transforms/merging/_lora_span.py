"""Any merge of adapters in what their factors span, where their products are small."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._lapack import stacked
from mtl_jax.transforms.adapters import lora as lora_lib
from mtl_jax.transforms.adapters._nodes import factors, put
from mtl_jax.transforms.merging import _compose, _spectral

Side = Literal["both", "in", "out"]
SIDES = get_args(Side)


def lora_span(
    loras: Sequence[Any],
    rule: Callable[..., Any],
    *,
    alpha: float | Sequence[float],
    side: Side = "both",
    weights: Any = None,
    key: Any = None,
    rslora: bool = False,
    check_finite: bool = True,
) -> Any:
    r"""Merges products of adapters by a rule that sees only what the factors span.

      [a_1 ... a_T] = Q_a [R_1 ... R_T],   [b_1^T ... b_T^T] = Q_b [L_1 ... L_T]
      s_t a_t b_t = Q_a C_t Q_b^T,         C_t = s_t R_t L_t^T     [k, l], k, l <= sum r
      result      = Q_a rule(C_1, ..., C_T) Q_b^T

    No matrix [in, out] is formed, and a spectral rule costs as much as for matrices of
    a few dozen rows. It is the rule of the whole products where this turns with their
    rows and columns: every sum, `model_stock`, `svc`, `opcm`. Rules that count singular
    values, zeros included, count those of C here: `tsv_merge` keeps the mean rank of
    each task, `iso_c` is larger by a factor, and `iso_cts` has directions of tasks
    beside the common ones. Rules of single entries are others in another basis.

    Args:
      loras: T adapters of the same leaves, {"a": [..., in, r], "b": [..., r, out]};
        ranks may differ.
      rule: any merge, (taus, weights=, key=) -> delta, of leaves [T, ..., k, l] under
        the names of the adapted ones. Options by `functools.partial`; a spectral rule
        wants `matrices=lambda name, shape: True` where axes lead.
      alpha: of the scale s_t = alpha / r_t; one for all, or one for each.
      side: which axis is reduced: "both"; "in" leaves the outputs as they are, C_t
        [k, out]; "out" the inputs, C_t [in, l], as `knots` wants, which turns with the
        outputs alone.
      weights: [T], for the rule.
      key: for the rule.
      rslora: s_t = alpha / sqrt(r_t).
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      An adapter with scale 1, of rank r_1 + ... + r_T, in the dtypes of the first: use
      it with `alpha` of that rank. Columns that a smaller matrix cannot fill are zeros.

    Raises:
      ValueError: no adapters, adapters of different leaves, a side that does not exist,
        a rule that returns leaves of another shape, NaN or infinity, or what the rule
        raises.

    Follows: the joint subspace of the adapters that Stoica et al. 2025, "Model merging
      with SVD to tie the KnOTS", section 4, merge in.
    Differs: any rule, either side or both, and QR where KnOTS takes an SVD.

    >>> import jax.numpy as jnp
    >>> from mtl_jax.transforms.merging import task_arithmetic
    >>> adapter = {"w": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
    >>> merged = lora_span([adapter, adapter], task_arithmetic, alpha=1.0)
    >>> (merged["w"]["a"] @ merged["w"]["b"]).round(4).tolist()
    [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    _compose.choice("lora_span", "side", side, SIDES)
    loras = list(loras)
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"lora_span: adapter {t}", each)
    # Of the same leaves, and with the scales in their second factors.
    joined = lora_lib.combine(loras, [1.0] * len(loras), alpha=alpha, rslora=rslora)
    named = [factors("lora_span", each) for each in loras]
    ranks = {name: tuple(x[name][0].shape[-1] for x in named) for name in named[0]}
    spans = {
        name: _span(*pair, ranks[name], side)
        for name, pair in factors("lora_span", joined).items()
    }
    cores: dict[str, Any] = {}
    for name, (core, _, _) in spans.items():
        put(cores, name.split("/"), core)
    merged = rule(cores, weights=weights, key=key)
    found = dict(zip(tree.paths(merged), jax.tree.leaves(merged), strict=True))
    out: dict[str, Any] = {}
    for name, (core, left, right) in spans.items():
        shape = jnp.shape(found.get(name))
        if shape != core.shape[1:]:
            raise ValueError(
                f"lora_span: the rule's {name!r} is {shape}, wanted {core.shape[1:]}"
            )
        pair = _expanded(found[name], left, right, sum(ranks[name]))
        put(out, name.split("/"), pair)
    dtypes = {name: (a.dtype, b.dtype) for name, (a, b) in named[0].items()}
    return _cast(out, dtypes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _span(a, b, ranks, side):
    """([T, ..., k, l], Q_a or None, Q_b^T or None) of [..., in, R], [..., R, out]."""
    a, b = (x.astype(tree.wide_dtype(x.dtype)) for x in (a, b))
    left = right = None
    if side != "out":
        left, a = stacked(jnp.linalg.qr, a)
    if side != "in":
        right, b = stacked(jnp.linalg.qr, _spectral.transpose(b))
        right, b = _spectral.transpose(right), _spectral.transpose(b)
    starts = [sum(ranks[:t]) for t in range(len(ranks))]
    tasks = [
        _spectral.matmul(a[..., i : i + r], b[..., i : i + r, :])
        for i, r in zip(starts, ranks, strict=True)
    ]
    return jnp.stack(tasks), left, right


@functools.partial(jax.jit, static_argnums=3)
def _expanded(core, left, right, rank):
    """The pair whose product is Q_a core Q_b^T, filled up with zeros to a rank."""
    if right is None:
        a, b = left, core
    else:
        a, b = core if left is None else _spectral.matmul(left, core), right
    front, more = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-1])
    return {
        "a": jnp.pad(a, [*front, (0, 0), more]),
        "b": jnp.pad(b, [*front, more, (0, 0)]),
    }


def _cast(lora, dtypes):
    out: dict[str, Any] = {}
    for name, (a, b) in factors("lora_span", lora).items():
        kinds = dtypes[name]
        put(out, name.split("/"), {"a": a.astype(kinds[0]), "b": b.astype(kinds[1])})
    return out
