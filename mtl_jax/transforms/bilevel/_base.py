"""What the bilevel methods share: task weights above, parameters of a model below."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms import loops
from mtl_jax.transforms.aggregation._base import AggregationState
from mtl_jax.transforms.aggregation._engines import LossFn, check_losses, task_vjp

Rate = Any  # A number, or an optax schedule of the step.


class BilevelState(NamedTuple):
    """State of a bilevel method.

    Attributes:
      upper: [T] float32, the upper variable: weights, or the logits of weights.
      opt_state: of the optimizer of `upper`.
      step: int32, updates so far.
      method: the method's own state.
    """

    upper: chex.Array
    opt_state: Any
    step: chex.Array
    method: Any = ()


class BilevelInfo(NamedTuple):
    """What an update saw.

    Attributes:
      losses: [T] float32, on the training batch at the parameters given.
      weights: [T] float32, the task weights after the update.
      hypergradient: [T] float32, what moved `upper`.
      finite: bool, whether losses and hypergradient are finite.
    """

    losses: chex.Array
    weights: chex.Array
    hypergradient: chex.Array
    finite: chex.Array


class Bilevel(NamedTuple):
    """A method that learns task weights on held-out data while the model trains.

    Attributes:
      init: `init(num_tasks) -> BilevelState`.
      update: `update(params, state, train_batch, valid_batch) ->
        (grads, state, BilevelInfo)`: one step of the upper variable, and a gradient
        like `params` for the optimizer of the model. Pure; compile it.
      weights: `weights(state) -> [T]` float32, the present task weights.
    """

    init: Callable[[int], BilevelState]
    update: Callable[..., tuple[Any, BilevelState, BilevelInfo]]
    weights: Callable[[BilevelState], chex.Array]


class AsAggregator(optax.GradientTransformationExtraArgs):
    """A bilevel method where a trainable takes an aggregator.

    Attributes:
      bilevel: `bilevel(loss_fn) -> Bilevel`, `loss_fn(params, batch) -> losses [T]`.
    """

    bilevel: Callable[[LossFn], Bilevel]

    def __new__(cls, init: Any, update: Any, bilevel: Callable[[LossFn], Bilevel]):
        """As an optax transformation, with the method beside it."""
        self = super().__new__(cls, init, update)
        self.bilevel = bilevel
        return self


def as_aggregator(
    factory: Callable[..., Bilevel], num_tasks: int, **options: Any
) -> AsAggregator:
    """A bilevel method for `train.Trainable(aggregator=..., grads="bilevel")`.

    The trainer splits each batch: its even rows are the training batch, by which the
    model moves, and its odd rows the held-out one. The state is an `AggregationState`
    around the `BilevelState`.

    Args:
      factory: one of `mtl_jax.bilevel`; it is given the loss of the trainable.
      num_tasks: T.
      **options: of the factory.

    Returns:
      An `AsAggregator`. Its `update` raises ValueError: these methods need the losses
      at other parameters, which task gradients do not tell.

    >>> from mtl_jax import bilevel
    >>> tx = as_aggregator(bilevel.moml, 2, inner_rate=0.5)
    >>> tx.init({"w": jnp.zeros(3)}).method.upper.tolist()
    [0.0, 0.0]
    """

    def make(loss_fn):
        return factory(loss_fn, **options)

    def init(params):
        del params
        first = make(lambda params, batch: jnp.zeros(num_tasks)).init(num_tasks)
        return AggregationState(method=first, finite=jnp.asarray(True))

    def update(updates, state, params=None, **extra):
        raise ValueError(
            "bilevel: these methods look at losses, not at task gradients; train with "
            "grads='bilevel', or call `Bilevel.update`"
        )

    return AsAggregator(init, update, make)


def sgd_path(
    loss_fn: LossFn,
    params: Any,
    weights: chex.Array,
    batch: Any,
    *,
    learning_rate: chex.Array | float,
    steps: int = 1,
) -> Any:
    r"""Parameters after plain gradient steps on the weighted losses of one batch.

      theta <- theta - learning_rate * sum_t w_t dL_t(theta) / dtheta

    Differentiable in `weights`: the path is stored step by step.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses [T]`.
      params: tree of floating point leaves.
      weights: [T] float32.
      batch: second argument of `loss_fn`.
      learning_rate: scalar.
      steps: 1 or more.

    Returns:
      Tree like `params`.

    >>> loss_fn = lambda w, x: jnp.stack([jnp.square(w - x), w])
    >>> round(float(sgd_path(loss_fn, 1.0, jnp.ones(2), 0.0, learning_rate=0.1)), 4)
    0.7
    """

    def step(params, _):
        losses, _, pullback = task_vjp("sgd_path", loss_fn, params, (batch,), False)
        if losses.shape != weights.shape:
            raise ValueError(
                f"sgd_path: losses are {losses.shape}, weights {weights.shape}"
            )
        return descend(params, pullback(weights), learning_rate), None

    params = jax.tree.map(jnp.asarray, params)
    return loops.scan(step, params, None, length=steps)[0]


def descend(params: Any, direction: Any, rate: Any) -> Any:
    """`params - rate * direction`, in float32 and back."""

    def leaf(p, d):
        wide = jnp.promote_types(p.dtype, jnp.float32)
        moved = p.astype(wide) - jnp.asarray(rate, wide) * d.astype(wide)
        return moved.astype(p.dtype)

    return jax.tree.map(leaf, params, direction)


def inner(a: Any, b: Any) -> chex.Array:
    """Inner product of two trees, float32."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b
    )
    return jax.tree.reduce(jnp.add, products)


def rate_at(rate: Rate, step: chex.Array) -> chex.Array:
    """A learning rate, or what its schedule says at a step."""
    return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)


def check_rate(name: str, what: str, rate: Rate) -> None:
    """Refuses a known rate that is not positive."""
    if not callable(rate) and not rate > 0:
        raise ValueError(f"{name}: {what} is {rate}, wanted it positive")


def start(
    name: str, num_tasks: int, value: float, tx: optax.GradientTransformation
) -> BilevelState:
    """The state before the first update, all tasks alike."""
    if num_tasks < 1:
        raise ValueError(f"{name}: num_tasks is {num_tasks}, wanted 1 or more")
    upper = jnp.full(num_tasks, value, jnp.float32)
    return BilevelState(upper, tx.init(upper), jnp.int32(0))


def move(
    tx: optax.GradientTransformation, state: BilevelState, hypergradient: chex.Array
) -> BilevelState:
    """One step of the upper variable."""
    # Optimizers mix dtypes and ranks, which a strict JAX refuses.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = tx.update(hypergradient, state.opt_state, state.upper)
        upper = optax.apply_updates(state.upper, updates)
    return state._replace(upper=upper, opt_state=opt_state, step=state.step + 1)


def report(losses: chex.Array, weights: chex.Array, hypergradient: chex.Array):
    """The `BilevelInfo` of an update."""
    check_losses("bilevel", losses)
    finite = jnp.all(jnp.isfinite(losses)) & jnp.all(jnp.isfinite(hypergradient))
    return BilevelInfo(losses.astype(jnp.float32), weights, hypergradient, finite)
