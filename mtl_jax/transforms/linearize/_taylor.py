"""First-order Taylor models in the parameters, one JVP per call."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree

ApplyFn = Callable[..., Any]


def _check(name: str, params0: chex.ArrayTree, other: chex.ArrayTree, what: str):
    tree.check_match(name, params0, other, reference_name="params0", other_name=what)


def float_part(
    params: chex.ArrayTree,
) -> tuple[list[chex.Array], Callable[[list[chex.Array]], chex.ArrayTree]]:
    """The leaves with a tangent space, and how to put others in their place."""
    leaves, treedef = jax.tree.flatten(params)
    where = [i for i, leaf in enumerate(leaves) if tree.is_inexact(leaf)]

    def join(floats):
        full = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            full[i] = leaf
        return treedef.unflatten(full)

    return [jnp.asarray(leaves[i]) for i in where], join


@jax.custom_jvp
def _add(primal: chex.Array, tangent: chex.Array) -> chex.Array:
    """Sum of both, formed wide; a zero tangent returns the primal, bit for bit."""
    dtype = tree.wide_dtype(primal.dtype)
    total = (primal.astype(dtype) + tangent.astype(dtype)).astype(primal.dtype)
    return jnp.where(tangent == 0, primal, total)  # -0.0 + 0.0 would be +0.0


@_add.defjvp
def _add_jvp(primals, tangents):
    return _add(*primals), tangents[0] + tangents[1]


def add_tangent(outputs: Any, tangents: Any) -> Any:
    """Adds tangents to outputs; outputs without a tangent space pass unchanged."""
    return jax.tree.map(
        lambda out, tan: _add(out, tan) if tree.is_inexact(out) else out,
        outputs,
        tangents,
    )


def _tangents(base: list[chex.Array], delta: chex.ArrayTree) -> list[chex.Array]:
    """Float leaves of delta in the dtypes of the base."""
    leaves, _ = float_part(delta)
    return [d.astype(p.dtype) for p, d in zip(base, leaves, strict=True)]


def _subtract(params: chex.ArrayTree, params0: chex.ArrayTree) -> chex.ArrayTree:
    """Difference of float leaves, formed wide; other leaves have none."""

    def leaf(p, p0):
        if not tree.is_inexact(p0):
            return p0
        p, p0 = jnp.asarray(p), jax.lax.stop_gradient(jnp.asarray(p0))
        dtypes = tree.wide_dtype(p.dtype), tree.wide_dtype(p0.dtype)
        dtype = max(dtypes, key=lambda d: d.itemsize)
        return p.astype(dtype) - p0.astype(dtype)

    return jax.tree.map(leaf, params, params0)


def taylor1_delta(
    apply_fn: ApplyFn, params0: chex.ArrayTree, *, has_aux: bool = False
) -> ApplyFn:
    r"""The first-order Taylor model as a function of the displacement.

      g(delta, x) = f(x; params0) + J_params f(x; params0) delta

    The form to train when the displacement itself is the parameter: weight decay
    then pulls towards `params0`, and a zero tree is the base model.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any pytree of arrays; with
        `has_aux`, `(outputs, aux)`.
      params0: point of expansion; not differentiated. Leaves without a tangent
        space (integers, PRNG keys) are used as they are.
      has_aux: whether `apply_fn` also returns values that are not expanded.

    Returns:
      `apply(delta, *inputs)` with the outputs of `apply_fn`, structure and dtypes
      kept; aux is that of `params0`.

    Raises:
      ValueError: if `delta` does not match `params0`, when called.

    >>> square = taylor1_delta(lambda p, x: (p["w"] * x) ** 2, {"w": jnp.array(3.0)})
    >>> square({"w": jnp.array(1.0)}, jnp.array(2.0))  # 36 + 2 * 6 * 2
    Array(60., dtype=float32)

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space".
    """

    def apply(delta, *inputs):
        _check("taylor1", params0, delta, "delta")
        base, join = float_part(params0)
        base = jax.lax.stop_gradient(base)
        out = jax.jvp(
            lambda floats: apply_fn(join(floats), *inputs),
            (base,),
            (_tangents(base, delta),),
            has_aux=has_aux,
        )
        moved = add_tangent(out[0], out[1])
        return (moved, out[2]) if has_aux else moved

    return apply


def taylor1(
    apply_fn: ApplyFn, params0: chex.ArrayTree, *, has_aux: bool = False
) -> ApplyFn:
    r"""Replaces a model by its first-order Taylor expansion at `params0`.

      f_lin(x; params) = f(x; params0) + J_params f(x; params0) (params - params0)

    One JVP per call, never a Jacobian. At `params == params0` the operations are those
    of `apply_fn` and nothing is added, bit for bit where the compiler rounds both
    programs alike, and the gradient is the ordinary gradient. Composes with `jit`,
    `vmap`, `grad`, `jax.checkpoint`, scanned layers and sharded inputs.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any pytree of arrays; with
        `has_aux`, `(outputs, aux)`. Must be deterministic: no dropout and no live
        batch statistics, or the base drifts from the stored checkpoint.
      params0: point of expansion, any pytree; not differentiated.
      has_aux: whether `apply_fn` also returns values that are not expanded.

    Returns:
      A function with the signature of `apply_fn`. Inputs stay differentiable.

    Raises:
      ValueError: if `params` does not match `params0`, when called.

    >>> model = lambda p, x: jnp.tanh(x @ p["w"])
    >>> base = {"w": jnp.eye(2)}
    >>> lin = taylor1(model, base)
    >>> bool((lin(base, jnp.ones(2)) == model(base, jnp.ones(2))).all())
    True

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space",
    and its code, which trains a copy of the parameters: weight decay acts
    on `params`. Train the displacement with `taylor1_delta` for decay to the base.

    **Differs**: leaves of `params` without a tangent space are ignored in favour of
    those of `params0`; the sum is formed in float32 or wider.
    """
    apply_delta = taylor1_delta(apply_fn, params0, has_aux=has_aux)

    def apply_lin(params, *inputs):
        _check("taylor1", params0, params, "params")
        return apply_delta(_subtract(params, params0), *inputs)

    return apply_lin


def scale_sweep(
    apply_fn: ApplyFn,
    params0: chex.ArrayTree,
    delta: chex.ArrayTree,
    scales: chex.Array,
) -> ApplyFn:
    r"""Taylor-1 outputs at `params0 + scale * delta` for every scale, from one JVP.

      out[a] = f(x; params0) + scales[a] J f(x; params0) delta

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params0: point of expansion.
      delta: tree like `params0`, for instance the sum of the task vectors.
      scales: [A].

    Returns:
      `sweep(*inputs) -> outputs` with leaves [A, ...]; outputs without a tangent
      space are repeated.

    Raises:
      ValueError: if `delta` does not match `params0` or `scales` is not a vector.

    >>> f = lambda p, x: p * x
    >>> sweep = scale_sweep(f, jnp.array(1.0), jnp.array(2.0), [0.0, 0.5])
    >>> sweep(jnp.array(3.0))
    Array([3., 6.], dtype=float32)

    **Follows**: linearity of the tangent model in its parameters; replaces the A
    forward passes of the scaling-coefficient search of task arithmetic.
    """
    _check("scale_sweep", params0, delta, "delta")
    scales = jnp.asarray(scales)
    if scales.ndim != 1:
        raise ValueError(f"scale_sweep: scales must be [A], found {scales.shape}")

    def sweep(*inputs):
        base, join = float_part(params0)
        outputs, tangents = jax.jvp(
            lambda floats: apply_fn(join(floats), *inputs),
            (base,),
            (_tangents(base, delta),),
        )

        def scaled(scale):
            def leaf(out, tan):
                if not tree.is_inexact(out):
                    return out
                wide = tree.wide_dtype(out.dtype)
                return _add(out, scale.astype(wide) * tan.astype(wide))

            return jax.tree.map(leaf, outputs, tangents)

        return jax.vmap(scaled)(scales)

    return sweep


def task_outputs(
    apply_fn: ApplyFn,
    params0: chex.ArrayTree,
    taus: chex.ArrayTree,
    *,
    batch_size: int | None = None,
) -> ApplyFn:
    r"""Taylor-1 outputs of T tasks that share one pass through the base model.

      out[t] = f(x; params0) + J f(x; params0) taus[t]

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`.
      params0: point of expansion.
      taus: task vectors, leaves [T, ...].
      batch_size: tasks pushed forward together. None takes all T at once and keeps
        T tangent activations; an integer keeps the residuals of one linearisation
        and `batch_size` tangents.

    Returns:
      `apply(*inputs) -> outputs` with leaves [T, ...].

    Raises:
      ValueError: if a leaf of `taus` is not a stack of leaves of `params0`.

    >>> apply = task_outputs(lambda p, x: p * x, jnp.array(1.0), jnp.array([0.0, 2.0]))
    >>> apply(jnp.array(3.0))
    Array([3., 9.], dtype=float32)

    **Follows**: Ortiz-Jimenez et al. 2023, the tangent model of each task vector.
    """
    tree.num_tasks("task_outputs", taus)
    one = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), taus)
    _check("task_outputs", params0, one, "taus[0]")

    def apply(*inputs):
        if batch_size is None:
            one_task = taylor1_delta(apply_fn, params0)
            return jax.vmap(lambda tau: one_task(tau, *inputs))(taus)
        base, join = float_part(params0)
        outputs, push = jax.linearize(lambda f: apply_fn(join(f), *inputs), base)
        return jax.lax.map(
            lambda tau: add_tangent(outputs, push(_tangents(base, tau))),
            taus,
            batch_size=batch_size,
        )

    return apply
