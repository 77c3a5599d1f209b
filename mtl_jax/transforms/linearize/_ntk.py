"""Empirical neural tangent kernels by products, without a Jacobian."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.linearize._taylor import ApplyFn, float_part


def _on(
    apply_fn: ApplyFn, join: Callable[[Any], chex.ArrayTree], inputs: Any
) -> Callable[[Any], Any]:
    """The model on fixed inputs; a tuple holds several positional inputs."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return lambda floats: apply_fn(join(floats), *inputs)


def ntk_vector_product(
    apply_fn: ApplyFn, params: chex.ArrayTree, x1: Any, x2: Any, v: Any
) -> Any:
    r"""One product with the empirical tangent kernel: a VJP, then a JVP.

      K(x1, x2) v = J(x1) J(x2)^T v

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any pytree of float arrays.
      params: where the model is linearised, any pytree.
      x1: inputs on the left; a tuple holds several positional inputs.
      x2: inputs on the right.
      v: tree like `apply_fn(params, x2)`.

    Returns:
      Tree like `apply_fn(params, x1)`.

    Raises:
      ValueError: if `v` does not match the outputs on `x2`.

    >>> f = lambda p, x: x @ p
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> ntk_vector_product(f, jnp.ones(2), x, x, jnp.array([1.0, 1.0]))
    Array([2., 3.], dtype=float32)

    **Follows**: Jacot et al. 2018, "Neural Tangent Kernel", the empirical kernel.
    """
    floats, join = float_part(params)
    right = _on(apply_fn, join, x2)
    tree.check_match(
        "ntk_vector_product",
        jax.eval_shape(right, floats),
        v,
        reference_name="the outputs on x2",
        other_name="v",
    )
    pulled = jax.vjp(right, floats)[1](v)
    return jax.jvp(_on(apply_fn, join, x1), (floats,), pulled)[1]


def _split_axes(
    shape: tuple[int, ...], trace_axes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Traced and kept axes of the outputs [N, ...], both without the batch axis."""
    ndim = len(shape)
    traced = []
    for axis in trace_axes:
        if not -ndim <= axis < ndim or axis % ndim == 0:
            raise ValueError(
                f"empirical_ntk: trace axis {axis} must name an axis after the first "
                f"of the outputs {shape}"
            )
        traced.append(axis % ndim)
    if len(set(traced)) != len(traced):
        raise ValueError(
            f"empirical_ntk: trace_axes {tuple(trace_axes)} repeat an axis"
        )
    return traced, [axis for axis in range(1, ndim) if axis not in traced]


def _output_shape(f: Callable, floats: Any, x: Any, name: str):
    out = jax.eval_shape(f, floats)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if not isinstance(out, jax.ShapeDtypeStruct) or sizes != set(out.shape[:1]):
        raise ValueError(
            f"empirical_ntk: apply_fn must map {name} with leading sizes "
            f"{sorted(sizes, key=str)} to one array [N, ...], found {out}"
        )
    return out


def empirical_ntk(
    apply_fn: ApplyFn,
    params: chex.ArrayTree,
    x1: Any,
    x2: Any = None,
    *,
    trace_axes: Sequence[int] = (-1,),
    batch_size: int = 16,
) -> chex.Array:
    r"""The empirical tangent kernel of a model, one product per output of `x2`.

      K[n, m, a, b] = (1 / S) sum_s <d f(x1[n])[a, s], d f(x2[m])[b, s]>

    with d the gradient with respect to `params`, s over the traced axes of the
    outputs, S their size, and a, b over the others. One linearisation of the model on
    `x1` serves all products, so memory is one set of activations on `x1`, plus
    `batch_size` gradients and as many sets of tangent activations.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [N, ...]`, treating examples one by one.
      params: where the model is linearised, any pytree.
      x1: inputs, leaves [N1, ...]; a tuple holds several positional inputs.
      x2: inputs, leaves [N2, ...]; None means `x1`.
      trace_axes: axes of the outputs to trace over; () keeps every axis.
      batch_size: outputs of `x2` handled together.

    Returns:
      [N1, N2, *kept, *kept] in the dtype of the outputs.

    Raises:
      ValueError: if the outputs are not one array [N, ...] or an axis is wrong.

    >>> f = lambda p, x: x @ p
    >>> empirical_ntk(f, jnp.ones((2, 3)), jnp.array([[1.0, 2.0]]))
    Array([[5.]], dtype=float32)

    **Follows**: Jacot et al. 2018, "Neural Tangent Kernel"; products as in Novak et al.
    2022, "Fast Finite Width Neural Tangent Kernel".

    **Differs**: the trace is divided by the size of the traced axes, as
    neural-tangents does, so values compare across numbers of classes; the kept axes of
    `x1` come before those of `x2`.
    """
    x2 = x1 if x2 is None else x2
    floats, join = float_part(params)
    f1, f2 = _on(apply_fn, join, x1), _on(apply_fn, join, x2)
    left = _output_shape(f1, floats, x1, "x1")
    right = _output_shape(f2, floats, x2, "x2")
    traced, kept = _split_axes(left.shape, trace_axes)
    order = [0, *kept, *traced]
    dims = [left.shape[axis] for axis in kept]
    num_kept = math.prod(dims)
    num_traced = math.prod(left.shape[axis] for axis in traced)
    cotangents = num_kept * num_traced
    n1, n2 = left.shape[0], right.shape[0]
    if 0 in (n1, n2, cotangents):
        return jnp.zeros((n1, n2, *dims, *dims), left.dtype)
    _, push = jax.linearize(f1, floats)

    def column(index):
        example, output = index // cotangents, index % cotangents
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, example, 1), x2
        )
        unit = jnp.zeros(cotangents, right.dtype).at[output].set(1)
        unit = unit.reshape([1, *(left.shape[axis] for axis in order[1:])])
        unit = jnp.moveaxis(unit, range(len(order)), order)
        (pulled,) = jax.vjp(_on(apply_fn, join, one), floats)[1](unit)
        moved = push(pulled)
        moved = jnp.transpose(moved, order).reshape(n1, num_kept, num_traced)
        return jax.lax.dynamic_index_in_dim(
            moved, output % num_traced, axis=2, keepdims=False
        )

    columns = jax.lax.map(column, jnp.arange(n2 * cotangents), batch_size=batch_size)
    columns = columns.reshape(n2, num_kept, num_traced, n1, num_kept)
    kernel = columns.astype(tree.wide_dtype(columns.dtype)).sum(2) / num_traced
    kernel = jnp.transpose(kernel, (2, 0, 3, 1)).reshape(n1, n2, *dims, *dims)
    return kernel.astype(left.dtype)
