"""Weightings: the losses of the tasks in, one scalar out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import tree

_FLOOR = 1e-12


class WeightingState(NamedTuple):
    """State of a weighting: what is not trained by gradients.

    Attributes:
      method: the method's own state.
      finite: bool, whether all that the last update was given was finite and, where the
        method takes logarithms or ratios of losses, these large enough for it. Losses
        that are too small are clipped to the smallest that is allowed, so that nothing
        becomes NaN; the flag says that it happened, the caller decides what to do.
    """

    method: Any
    finite: chex.Array


class Weighting(NamedTuple):
    """A method that weighs tasks by looking at their losses.

    A train step keeps `params` beside the parameters of the model, in the same
    optimizer, and `state` beside the optimizer's state:

        def objective(params, batch):
          losses = loss_fn(params["model"], batch)
          return method.loss(losses, params["tasks"], state), losses

        grads, losses = jax.grad(objective, has_aux=True)(params, batch)
        ...
        state = method.update(state, losses)

    Attributes:
      init: `init(num_tasks) -> (params, state)`: what is trained with the model, an
        empty dict in most methods, and a `WeightingState`.
      loss: `loss(losses, params, state, present=None) -> scalar` float32, to be
        differentiated in `losses` and `params`. `present` is bool [T], False for tasks
        without an example in the batch, whose losses are not read; None = all are.
      update: `update(state, losses, present=None, **extra) -> state`, once after every
        step. `extra` may hold `after` [T], the losses of the same batch after the
        step, and `norms` [T], the norms of the task gradients; a method takes what it
        needs and ignores the rest.
      needs: which of "after" and "norms" the update cannot do without. One that needs
        no norms costs one backward pass in a train step, "after" one more forward pass.
    """

    init: Callable[[int], tuple[Any, WeightingState]]
    loss: Callable[..., chex.Array]
    update: Callable[..., WeightingState]
    needs: tuple[str, ...] = ()

    def weights(
        self,
        losses: chex.Array,
        params: Any,
        state: WeightingState,
        present: chex.Array | None = None,
    ) -> chex.Array:
        """How much each task counts: the derivative of `loss` by the losses, [T]."""
        self.loss(losses, params, state, present)  # Refuses known values by name.
        return jax.grad(self.loss)(_wide(losses), params, state, present)


def from_loss(
    name: str,
    loss: Callable[..., chex.Array],
    *,
    init: Callable[[int], tuple[Any, Any]] = lambda num_tasks: ({}, ()),
    update: Callable[..., Any] = lambda state, losses, present, **extra: state,
    lower: Any = None,
    needs: tuple[str, ...] = (),
) -> Weighting:
    """Makes a `Weighting` of a method's formulas.

    Args:
      name: of the public function, for error messages.
      loss: `loss(losses, params, state, present) -> scalar`; `losses` are float32, an
        allowed constant where a task is absent, and `present` is bool [T].
      init: `init(num_tasks) -> (params, method state)`.
      update: `update(state, losses, present, **extra) -> method state`.
      lower: losses must be greater, a scalar or [T]; None = any finite ones will do.
      needs: see `Weighting`.

    Returns:
      A `Weighting`. Its functions raise ValueError on losses that are not [T] and, on
      known values, on losses that are not finite or too small.

    >>> def largest(losses, params, state, present):
    ...     return jnp.max(jnp.where(present, losses, -jnp.inf))
    >>> method = from_loss("largest", largest)
    >>> method.weights([1.0, 3.0], *method.init(2)).tolist()
    [0.0, 1.0]
    """

    def init_fn(num_tasks: int):
        if num_tasks < 1:
            raise ValueError(f"{name}: num_tasks is {num_tasks}, wanted 1 or more")
        params, method = init(num_tasks)
        return params, WeightingState(method, jnp.asarray(True))

    def loss_fn(losses, params, state, present=None):
        losses, present, _ = _arguments(name, losses, present, lower)
        return loss(losses, params, state.method, present)

    def update_fn(state, losses, present=None, **extra):
        losses, present, finite = _arguments(name, losses, present, lower)
        for what in ("after", "norms"):
            if extra.get(what) is not None:
                given = per_task(name, what, extra[what], losses.shape)
                sound = jnp.isfinite(given) | ~present
                _refuse(name, what, given, sound, None)
                finite = finite & jnp.all(sound)
        method = update(state.method, losses, present, **extra)
        return WeightingState(method, finite)

    return Weighting(init_fn, loss_fn, update_fn, needs)


def per_task(name: str, what: str, values: Any, shape: tuple[int, ...]) -> chex.Array:
    """One float32 number for each task.

    Args:
      name: of the public function, for error messages.
      what: the argument's name.
      values: a sequence of T numbers.
      shape: that of the losses.

    Raises:
      ValueError: the values do not fit the losses.
    """
    values = jnp.asarray(values, jnp.float32)
    if values.shape != shape:
        raise ValueError(f"{name}: {what} is {values.shape}, losses are {shape}")
    return values


def numbers(name: str, what: str, values: Sequence[float]) -> np.ndarray:
    """Hyperparameters of a factory, one finite number per task.

    Raises:
      ValueError: `values` is not a non-empty list of finite numbers.
    """
    found = np.asarray(values, np.float32)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise ValueError(f"{name}: {what} wants one finite number per task")
    return found


def descend(
    tx: optax.GradientTransformation, gradient: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """One optimizer step: new parameters and optimizer state."""
    # Optimizers mix dtypes and ranks, which a strict JAX refuses.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def masked_sum(values: chex.Array, present: chex.Array) -> chex.Array:
    """Sum over the tasks that are present."""
    return jnp.sum(jnp.where(present, values, 0))


def masked_mean(values: chex.Array, present: chex.Array) -> chex.Array:
    """Mean over the tasks that are present; 0 where none is."""
    count = jnp.maximum(jnp.sum(present), 1).astype(values.dtype)
    return masked_sum(values, present) / count


def _wide(losses: Any) -> chex.Array:
    losses = jnp.asarray(losses)
    dtype = losses.dtype if tree.is_inexact(losses) else jnp.float32
    return losses.astype(tree.wide_dtype(dtype))


def _arguments(name, losses, present, lower):
    """Losses in float32, harmless where absent, the mask, and whether all is well."""
    losses = _wide(losses)
    if losses.ndim != 1 or not losses.size:
        raise ValueError(f"{name}: losses are {losses.shape}, wanted one per task, [T]")
    if present is None:
        present = jnp.ones(losses.shape, bool)
    present = jnp.asarray(present)
    if present.shape != losses.shape or present.dtype != jnp.bool_:
        raise ValueError(
            f"{name}: present is {present.dtype}{list(present.shape)}, "
            f"wanted bool{list(losses.shape)}"
        )
    sound = jnp.isfinite(losses)
    floor = None
    if lower is not None:
        bounds = jnp.full(losses.shape, lower) if np.ndim(lower) == 0 else lower
        bounds = per_task(name, "lower bounds", bounds, losses.shape)
        floor = bounds.astype(losses.dtype)
        sound = sound & (losses > floor)
    sound = sound | ~present
    _refuse(name, "loss", losses, sound, floor)
    if floor is None:
        return jnp.where(present, losses, 1), present, jnp.all(sound)
    losses = jnp.where(present, jnp.maximum(losses, floor + _FLOOR), floor + 1)
    return losses, present, jnp.all(sound)


def _refuse(name, what, values, sound, floor):
    """Names the first bad value where they are known."""
    if any(isinstance(x, jax.core.Tracer) for x in (values, sound)):
        return
    bad = np.flatnonzero(~np.asarray(sound))
    if bad.size:
        task = int(bad[0])
        wanted = "a finite number"
        if floor is not None:
            wanted += f" greater than {float(floor[task]):g}"
        raise ValueError(
            f"{name}: {what} of task {task} is {float(values[task]):g}, wanted {wanted}"
        )
