"""Per-task gradients, and what can be had of them without forming them.

All engines start from the backward pass as a linear function of one cotangent per
task, the *pullback* `e [T] -> J^T e`, J being the Jacobian [T, P] of the losses:

  map      J, one row after another; the memory of one backward pass besides J.
  vmap     J, all rows at once.
  gramian  G = J J^T without J. Row j is `J (J^T e_j)`; the transpose of the pullback
           gives `u -> J u`. Any weighted sum of the rows is then one pullback. Takes
           about twice the products of map, and the memory of one gradient.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax._strides import as_rows
from mtl_jax.transforms import loops
from mtl_jax.transforms.aggregation._base import gram_of

LossFn = Callable[..., Any]
Pullback = Callable[[chex.Array], Any]

ROWS = ("auto", "map", "vmap")
GRAMS = ("auto", "gramian", "map", "vmap")


def value_and_task_grads(
    loss_fn: LossFn,
    *,
    engine: str = "auto",
    chunk: int | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """One gradient per task, as `jax.value_and_grad` gives one for a scalar.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses [T]`, or `(losses, aux)`.
      engine: "map" (rows one after another), "vmap" (all at once), "auto" (map).
      chunk: of "vmap": how many rows at once; None for all.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `fn(params, *args) -> (losses, grads)`, or `((losses, aux), grads)`: losses [T]
      float32, leaves of grads [T, ...] in the dtypes of `params`.

    Raises:
      ValueError: an unknown engine, a chunk below 1 or of another engine; losses that
        are not one floating point vector; a leaf of params that is not floating point.

    >>> fn = value_and_task_grads(lambda w, x: x @ w)
    >>> losses, grads = fn(jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> losses.tolist(), grads.tolist()
    ([3.0, 7.0], [[1.0, 2.0], [3.0, 4.0]])
    """
    name = "value_and_task_grads"
    check_engine(name, engine, ROWS)
    check_chunk(name, engine, chunk)

    def fn(params, *args):
        losses, aux, pullback = task_vjp(name, loss_fn, params, args, has_aux)
        grads = task_rows(pullback, losses, engine=engine, chunk=chunk)
        return value_of(losses, aux, has_aux), grads

    return fn


def value_and_gramian(
    loss_fn: LossFn, *, engine: str = "auto", has_aux: bool = False
) -> Callable[..., tuple[Any, chex.Array, Pullback]]:
    """Losses, the Gramian of the task gradients, and the way back to a gradient.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses [T]`, or `(losses, aux)`.
      engine: "gramian" never forms the task gradients; "map" and "vmap" do; "auto" is
        "gramian" where the backward pass can be transposed, else "map".
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `fn(params, *args) -> (losses, gram, pullback)`, with `(losses, aux)` first where
      there is aux: losses [T] and gram [T, T] float32, and `pullback(weights [T])` the
      gradient `sum_t weights[t] * grads[t]`, leaves like `params`.

    Raises:
      ValueError: as `value_and_task_grads`; and engine "gramian" where the backward
        pass holds an operation that has no transpose.

    >>> fn = value_and_gramian(lambda w, x: x @ w)
    >>> _, gram, pullback = fn(jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> gram.tolist(), pullback(jnp.array([1.0, -1.0])).tolist()
    ([[5.0, 11.0], [11.0, 25.0]], [-2.0, -2.0])
    """
    name = "value_and_gramian"
    check_engine(name, engine, GRAMS)

    def fn(params, *args):
        losses, aux, pullback = task_vjp(name, loss_fn, params, args, has_aux)
        gram, weighted = gram_and_pullback(name, pullback, losses, engine)
        return value_of(losses, aux, has_aux), gram, weighted

    return fn


def value_and_combined_grad(
    loss_fn: LossFn,
    weights_fn: Callable[[chex.Array], chex.Array],
    *,
    engine: str = "auto",
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """The gradient of a method that needs the Gramian only.

    A rule with a state, or one that looks at the losses, goes with
    `value_and_gramian`.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses [T]`, or `(losses, aux)`.
      weights_fn: `gram [T, T] float32 -> weights [T]`, such as `weights.mgda`.
      engine: see `value_and_gramian`.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      `fn(params, *args) -> (losses, grad)`, or `((losses, aux), grad)`; leaves of grad
      like `params`.

    Raises:
      ValueError: as `value_and_gramian`.

    >>> def inverse_squares(gram):
    ...     return 1 / jnp.diag(gram)
    >>> fn = value_and_combined_grad(lambda w, x: x @ w, inverse_squares)
    >>> fn(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 2.0]]))[1].tolist()
    [1.0, 0.5]
    """
    name = "value_and_combined_grad"
    check_engine(name, engine, GRAMS)

    def fn(params, *args):
        losses, aux, pullback = task_vjp(name, loss_fn, params, args, has_aux)
        gram, weighted = gram_and_pullback(name, pullback, losses, engine)
        return value_of(losses, aux, has_aux), weighted(weights_fn(gram))

    return fn


def task_vjp(
    fn_name: str, loss_fn: LossFn, params: Any, args: Any, has_aux: bool
) -> tuple[chex.Array, Any, Pullback]:
    """(losses, aux or None, pullback) of a loss function, checked.

    The pullback takes [T] of any floating dtype and gives leaves like `params`.
    """
    for leaf_name, leaf in named_leaves(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{fn_name}: {leaf_name!r} is {jnp.result_type(leaf)}, gradients want "
                "floating point leaves; close over the others"
            )

    def fn(params):
        out = loss_fn(params, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                f"{fn_name}: loss_fn wants to return (losses [T], aux), "
                f"found {type(out).__name__}"
            )
        losses: Any = out[0] if has_aux else out
        aux = out[1] if has_aux else None
        check_losses(fn_name, losses)
        return losses.astype(tree.wide_dtype(losses.dtype)), aux

    losses, pull, aux = jax.vjp(fn, params, has_aux=True)

    def pullback(cotangent):
        return pull(cotangent.astype(losses.dtype))[0]

    return losses, aux, pullback


def task_rows(
    pullback: Pullback,
    losses: chex.Array,
    *,
    engine: str = "map",
    chunk: int | None = None,
) -> Any:
    """The task gradients, leaves [T, ...]: the pullback of every unit vector.

    Args:
      pullback: linear, [T] -> tree.
      losses: [T]; gives T, dtype and placement.
      engine: "map", "vmap" or "auto" (map).
      chunk: of "vmap": how many rows at once; None for all.

    >>> losses, pullback = jax.vjp(lambda w: 2 * w, jnp.ones(2))
    >>> task_rows(lambda e: pullback(e)[0], losses).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    basis = _basis(losses)
    if engine != "vmap":
        return loops.scan(lambda _, e: ((), pullback(e)), (), basis)[1]

    def together(units):
        return jax.tree.map(as_rows, jax.vmap(pullback)(units))

    count = len(basis)
    if chunk is None or chunk >= count:
        return together(basis)
    full = count // chunk * chunk
    blocks = basis[:full].reshape(-1, chunk, count)
    rows = loops.scan(lambda _, units: ((), together(units)), (), blocks)[1]
    rows = jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), rows)
    if full == count:
        return rows
    return jax.tree.map(
        lambda x, y: jnp.concatenate([x, y]), rows, together(basis[full:])
    )


def task_gramian(pullback: Pullback, losses: chex.Array) -> chex.Array:
    """J J^T [T, T] float32 from the pullback and its transpose.

    Sums are formed in the dtypes that the backward pass works in.

    Args:
      pullback: structurally linear, [T] -> tree: see `has_transpose`.
      losses: [T]; gives T, dtype and placement.

    >>> losses, pullback = jax.vjp(lambda w: 2 * w, jnp.ones(2))
    >>> task_gramian(lambda e: pullback(e)[0], losses).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    transposed = jax.linear_transpose(pullback, losses)
    _, rows = loops.scan(
        lambda _, e: ((), transposed(pullback(e))[0]), (), _basis(losses)
    )
    gram = rows.astype(jnp.float32)
    return (gram + gram.T) / 2


def has_transpose(pullback: Pullback, losses: chex.Array) -> bool:
    """Whether every operation of the backward pass has a transpose; traces only.

    One that has none is part of the backward rule of a `jax.custom_vjp`: a call to the
    host, a loop of unknown length, a kernel without a rule of its own, or something
    that is not linear, such as clipping.

    >>> has_transpose(lambda e: 2 * e, jnp.ones(2))
    True
    >>> has_transpose(lambda e: jnp.clip(e, -1, 1), jnp.ones(2))
    False
    """
    jax.eval_shape(pullback, losses)  # An error of the model itself is not ours.
    try:
        jax.eval_shape(
            lambda e: jax.linear_transpose(pullback, losses)(pullback(e))[0], losses
        )
    except Exception:  # Each primitive has its own way of saying so.
        return False
    return True


def gram_and_pullback(
    fn_name: str, pullback: Pullback, losses: chex.Array, engine: str
) -> tuple[chex.Array, Pullback]:
    """Gramian [T, T] float32 and `weights [T] -> gradient`, by the engine asked for."""
    if engine in ("auto", "gramian"):
        if has_transpose(pullback, losses):
            return task_gramian(pullback, losses), pullback
        if engine == "gramian":
            raise ValueError(
                f"{fn_name}: the backward pass of loss_fn cannot be transposed (a "
                'custom_vjp whose backward rule JAX cannot transpose); use engine="map"'
            )
    grads = task_rows(pullback, losses, engine=engine)
    return gram_of(fn_name, tree.gram(grads)), lambda w: tree.combine(grads, w)


def check_engine(fn_name: str, engine: str, known: tuple[str, ...]) -> None:
    """Refuses an engine that is not in the list, by name."""
    if engine not in known:
        raise ValueError(
            f"{fn_name}: engine is {engine!r}, wanted one of {', '.join(known)}"
        )


def check_chunk(fn_name: str, engine: str, chunk: int | None) -> None:
    """Refuses a number of rows at once that is none, or that nothing listens to."""
    if chunk is not None and (engine != "vmap" or chunk < 1):
        raise ValueError(
            f"{fn_name}: chunk is {chunk} with engine {engine!r}, wanted 1 or more "
            "with 'vmap'"
        )


def check_losses(fn_name: str, losses: Any) -> int:
    """T of a vector of losses.

    Raises:
      ValueError: it is not [T] with T of 1 or more, or not floating point.
    """
    shape = getattr(losses, "shape", ())
    if len(shape) != 1 or not shape[0]:
        found = shape if hasattr(losses, "shape") else type(losses).__name__
        raise ValueError(
            f"{fn_name}: the losses of loss_fn are {found}, wanted [T], one per task"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"{fn_name}: the losses of loss_fn are {losses.dtype}, "
            "wanted floating point"
        )
    return shape[0]


def _basis(losses: chex.Array) -> chex.Array:
    """Unit vectors [T, T], placed (and, inside shard_map, varying) like the losses."""
    return jnp.eye(losses.shape[0], dtype=losses.dtype) * jnp.ones_like(losses)[None]


def value_of(losses: chex.Array, aux: Any, has_aux: bool) -> Any:
    """The losses, and aux where there is some."""
    return (losses, aux) if has_aux else losses
