"""What the Dense layers of Linen modules see: Gram matrices of their inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import InputGram

_TOTAL, _ROWS = "gram_total", "gram_rows"


def input_grams(
    apply_fn: Callable[[Any, Any], Any],
    *,
    mask_fn: Callable[[Any], chex.Array] | None = None,
) -> Callable[[Any, Any], Any]:
    """Makes the function that `merging.mean_grams` and `regmean_plus_plus` take.

    Works for any code that applies Linen modules, scanned or recomputed too: every
    `nn.Dense` finds a zero beside its kernel, whose slope is defined to be the Gram of
    the layer's inputs. So only layers whose outputs reach the result are seen, and no
    activation is kept beyond its batch.

    Args:
      apply_fn: `apply_fn(params, batch) -> outputs`; params is the nested dict of the
        module that is applied at the top.
      mask_fn: `mask_fn(batch) -> [B, ...]`, True = a row that counts, such as the
        attention mask. Inputs of fewer axes, [B, d], count where any of a row does.

    Returns:
      `capture_fn(params, batch)` -> tree like `params` of `merging.InputGram` in the
      places of the kernels of `nn.Dense` layers, total [..., d, d] and rows [...]
      float32, leading axes those of scanned kernels; None in all other places.

    Raises:
      ValueError: (when called) no Dense layer, or inputs that the mask does not fit.

    >>> from mtl_jax import models
    >>> mlp = models.Mlp(features=(2,))
    >>> capture = input_grams(lambda params, x: mlp.apply({"params": params}, x))
    >>> params = mlp.init(jax.random.key(0), jnp.ones((1, 1)))["params"]
    >>> found = capture(params, jnp.array([[1.0], [2.0]]))["layers_0"]
    >>> found["bias"], found["kernel"].total.tolist(), found["kernel"].rows.tolist()
    (None, [[5.0]], 2.0)
    """

    def capture_fn(params, batch):
        mask = None if mask_fn is None else mask_fn(batch)
        seen: set[str] = set()

        def result(probes):
            with nn.intercept_methods(_reader(mask, seen)):
                outputs = apply_fn(_with_probes(params, probes), batch)
            found = [x for x in jax.tree.leaves(outputs) if tree.is_inexact(x)]
            return sum(jnp.sum(x.astype(jnp.float32)) for x in found)

        grams = jax.grad(result)(_probes(params))
        if not seen:
            raise ValueError("input_grams: apply_fn reads no kernel by nn.Dense")
        return tree.map_with_path(
            lambda name, _: (
                InputGram(*grams[name])
                if name.rpartition("/")[2] == "kernel"
                and name.removesuffix("kernel").removesuffix("/") in seen
                else None
            ),
            params,
        )

    return capture_fn


def _probes(params) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Zeros for the Gram and the number of rows of every kernel, by its name."""
    found = zip(tree.paths(params), jax.tree.leaves(params), strict=True)
    return {
        name: (
            jnp.zeros((*x.shape[:-1], x.shape[-2]), jnp.float32),
            jnp.zeros(x.shape[:-2], jnp.float32),
        )
        for name, x in found
        if name.rpartition("/")[2] == "kernel" and jnp.ndim(x) > 1
    }


def _with_probes(params, probes, path=""):
    """The parameters with two more leaves beside every kernel that has them."""
    out = {}
    for key, value in params.items():
        name = f"{path}{key}"
        nested = isinstance(value, Mapping)
        out[key] = _with_probes(value, probes, f"{name}/") if nested else value
        if name in probes:
            out[_TOTAL], out[_ROWS] = probes[name]
    return out


def _reader(mask, seen):
    def intercept(call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
            return call(*args, **kwargs)
        own = layer.variables.get("params", {})
        if _TOTAL not in own:
            return call(*args, **kwargs)
        seen.add("/".join(layer.path))
        x, *rest = args
        weight = row_weights("input_grams", "/".join(layer.path), x, mask)
        probes = own[_TOTAL], own[_ROWS]
        return call(tap(x, probes, _gram(x, weight)), *rest, **kwargs)

    return intercept


def row_weights(
    fn_name: str, layer: str, x: chex.Array, mask: chex.Array | None
) -> chex.Array:
    """[...] float32, 1 for rows of x [..., d] that count, of a mask of more axes."""
    rows = x.shape[:-1]
    if mask is None:
        return jnp.ones(rows, jnp.float32)
    marks = jnp.asarray(mask).astype(bool)
    if marks.shape[: len(rows)] != rows:
        raise ValueError(
            f"{fn_name}: inputs of {layer!r} are {x.shape}, the mask is {marks.shape}"
        )
    return marks.any(tuple(range(len(rows), marks.ndim))).astype(jnp.float32)


def _gram(x, weight):
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weighted = flat * weight.reshape(-1, 1)
    return jnp.matmul(weighted.T, flat, precision="highest"), weight.sum()


@jax.custom_vjp
def tap(x: chex.Array, probes: Any, values: Any) -> chex.Array:
    """x, with a slope along `probes` that is defined to be `values`.

    So what layers see comes out of scanned or recomputed ones, as gradients do.

    Args:
      x: any array, handed on.
      probes: tree of zeros.
      values: tree of arrays like `probes`.
    """
    del probes, values
    return x


def _tap_forward(x, probes, values):
    del probes
    return x, values


def _tap_backward(values, slope):
    return slope, values, jax.tree.map(jnp.zeros_like, values)


tap.defvjp(_tap_forward, _tap_backward)
