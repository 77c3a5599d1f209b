"""Modules with low-rank adapters and quantised kernels, read by their Dense layers."""

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.adapters import lora as lora_lib
from mtl_jax.transforms.quantization import nf4


def apply_adapted(
    module: nn.Module,
    params: Mapping[str, Any],
    lora: Any,
    *inputs: Any,
    alpha: float = 1.0,
    rslora: bool = False,
    index: chex.Array | None = None,
    **options: Any,
) -> Any:
    """Applies a module whose Dense layers add `s (x a) b` to their outputs.

    Beside `adapters.lora.merge` it forms no adapted kernels and no gradients of their
    size, decodes a quantised kernel inside its layer only (one at a time where layers
    are recomputed), and serves every example by its own adapter. It works for modules
    of others, scanned or recomputed, as factors and codes lie inside the parameters.

    Args:
      module: a Linen module; what is adapted or quantised must be the kernels of its
        `nn.Dense` layers. Other quantised leaves are decoded first.
      params: its parameters; kernels may be `quantization.nf4` leaves.
      lora: an adapter of them; with `index` a bank of T; None = none.
      *inputs: of the module.
      alpha: see `adapters.lora.scale`.
      rslora: see `adapters.lora.scale`.
      index: [B] integer, the adapter of each example, along the first axis of what
        every adapted layer sees.
      **options: keyword arguments of the call.

    Returns:
      What the module returns.

    Raises:
      ValueError: an adapter that does not fit, or one for a kernel that no Dense layer
        of this call has read.

    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(4, 2))
    >>> x = jnp.ones((3, 5))
    >>> params = mlp.init(jax.random.key(0), x)["params"]
    >>> adapter = lora_lib.init(jax.random.key(1), params, ["kernel$"], rank=1)
    >>> out = apply_adapted(mlp, params, adapter, x, alpha=2.0)
    >>> bool(jnp.array_equal(out, mlp.apply({"params": params}, x)))
    True
    """
    if lora is not None:
        scaling = {"alpha": alpha, "rslora": rslora}
        params = lora_lib.splice(params, lora, **scaling, index=index)
    params = _decoded(params)
    wanted = {
        name.removesuffix(end)
        for name in tree.paths(params)
        for end in ("/lora_a", "/kernel/codes")
        if name.endswith(end)
    }
    seen: set[str] = set()

    def intercept(call, args, kwargs, context):
        if not _is_dense(context):
            return call(*args, **kwargs)
        layer = context.module
        found = dict(layer.variables.get("params", {}))
        kernel = found.get("kernel")
        if not nf4.is_quantized(kernel) and "lora_a" not in found:
            return call(*args, **kwargs)
        seen.add("/".join(layer.path))
        a, b, index = (found.pop(f"lora_{k}", None) for k in ("a", "b", "index"))
        if nf4.is_quantized(kernel):
            found["kernel"] = nf4.decode(kernel)
            # A layer outside of the module, with the parameters as they should be.
            alone = layer.clone(parent=None, name=None)
            out = alone.apply({"params": found}, *args, **kwargs)
        else:
            out = call(*args, **kwargs)
        if a is None:
            return out
        return out + _low_rank(args[0], a, b, index, out.dtype)

    with nn.intercept_methods(intercept):
        out = module.apply({"params": params}, *inputs, **options)
    if missed := sorted(wanted - seen):
        raise ValueError(
            f"apply_adapted: {missed[0]!r} is adapted or quantised, but no Dense layer "
            f"reads it{f' (and {len(missed) - 1} more)' if missed[1:] else ''}; use "
            "adapters.lora.merge and nf4.dequantize"
        )
    return out


def _is_dense(context) -> bool:
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__"


def _decoded(params):
    """Decodes what is not called `kernel`."""

    def leaf(path, x):
        own = nf4.is_quantized(x) and not tree.path_str(path).endswith("/kernel")
        return nf4.decode(x) if own else x

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=nf4.is_quantized)


def _low_rank(x, a, b, index, dtype):
    a, b, x = a.astype(dtype), b.astype(dtype), x.astype(dtype)
    if index is None:
        # Of two dimensions, so that XLA's CPU backend need not turn the whole gradient
        # of the output over for that of b.
        flat = x.reshape(-1, x.shape[-1])
        return ((flat @ a) @ b).reshape(*x.shape[:-1], b.shape[-1])
    x = jnp.einsum("b...i,bir->b...r", x, a[index])
    return jnp.einsum("b...r,bro->b...o", x, b[index])
