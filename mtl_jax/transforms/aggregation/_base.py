"""Aggregators: task-leading gradients in, one params-shaped update out.

Most methods look at nothing but inner products: a *rule* maps the Gramian of the task
gradients to one weight per task. The algorithm around it is written here once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree


class Weigh(Protocol):
    """`(gram [T, T] float32, state, **extra) -> (weights [T] float32, new state)`."""

    def __call__(
        self, gram: chex.Array, state: Any, **extra: Any
    ) -> tuple[chex.Array, Any]:
        """See the class."""
        ...


READS = ("gram", "cross_gram", "losses")
Heads = Callable[[chex.Array, chex.Array | None], chex.Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A method that needs no task gradient itself, only one weight per task.

    Attributes:
      init: `() -> state`; what the rule carries from step to step.
      weigh: `weigh(gram, state, **extra) -> (weights, state)`. `extra` may hold
        `losses` [T] float32, `present` bool [T], False for tasks without an example in
        the batch, and `cross_gram` [T, T], the inner products between the task
        gradients of two batches; a rule takes what it needs and ignores the rest.
      reads: what the weights depend on besides the state, some of "gram",
        "cross_gram" and "losses". Without "gram", `gram` may be zeros [T, T]; without
        both Gramians, one backward pass of the weighed losses is the whole update.
      due: `due(state) -> bool []`, whether the next weights depend on anything but the
        state; where they do not, one backward pass is the whole update too. None for
        always.
      after: `after(state, losses) -> state`, for a method that looks at what a step has
        brought: runs once the parameters have moved, on the losses [T] of the same
        batch and the same random draws; None where the method has no use for them.

    Raises:
      ValueError: `reads` holds another name.
    """

    init: Callable[[], Any]
    weigh: Weigh
    reads: tuple[str, ...] = ("gram", "losses")
    after: Callable[[Any, chex.Array], Any] | None = None
    due: Callable[[Any], chex.Array] | None = None

    def __post_init__(self):
        if isinstance(self.reads, str) or not set(self.reads) <= set(READS):
            raise ValueError(
                f"Rule: reads is {self.reads!r}, wanted a tuple of some of "
                + ", ".join(READS)
            )


class AggregationState(NamedTuple):
    """State of an aggregator.

    Attributes:
      method: the method's own state.
      finite: bool, whether all task gradients of the last update were finite. Nothing
        is replaced where they were not; the caller decides what to do.
    """

    method: Any
    finite: chex.Array


class Aggregator(optax.GradientTransformationExtraArgs):
    """An optax transformation from task trees to params-shaped updates.

    Attributes:
      rule: the `Rule`, by which engines that never form the [T, P] Jacobian weigh the
        tasks; None for methods that need the gradients themselves.
      heads: `heads(losses [T], weights [T] or None) -> [T]`, what the losses count for
        in parameters that tasks do not share, for methods that say so: weightings of
        losses, and those that replace the losses; weights are those of the shared
        gradients where the method has them. None for one each.
      per_parameter: whether its state or its groups are those of parameters, so that
        gradients of anything else, such as features, do not fit.
      wants: names of arguments without which `update` fails, besides those that every
        engine of the trainer gives.
    """

    rule: Rule | None
    heads: Heads | None
    per_parameter: bool
    wants: tuple[str, ...]

    def __new__(
        cls,
        init: Any,
        update: Any,
        rule: Rule | None = None,
        *,
        heads: Heads | None = None,
        per_parameter: bool = False,
        wants: tuple[str, ...] = (),
    ):
        """As an optax transformation, with what an engine has to know beside it."""
        self = super().__new__(cls, init, update)
        self.rule, self.heads = rule, heads
        self.per_parameter, self.wants = per_parameter, wants
        return self


def from_gradients(
    name: str,
    init: Callable[[Any], Any],
    update: Callable[..., tuple[Any, Any]],
    *,
    rule: Rule | None = None,
    robust: bool = False,
    heads: Heads | None = None,
    per_parameter: bool = False,
    wants: tuple[str, ...] = (),
) -> Aggregator:
    """Lifts a function of task gradients to a transformation that heads a chain.

    Args:
      name: of the public function, for error messages.
      init: `init(params) -> method state`.
      update: `update(task_grads, state, **extra) -> (updates, state)`, leaves [T, ...]
        in and [...] out.
      rule: see `Aggregator`.
      robust: the method withstands infinite entries, so only its own updates are
        looked at. Others become NaN where a task is NaN or infinite.
      heads: see `Aggregator`.
      per_parameter: see `Aggregator`.
      wants: see `Aggregator`.

    Returns:
      An `Aggregator`; its update raises ValueError on leaves that do not lead with one
      task axis, or that do not fit `params` where those are given.

    >>> def largest(grads, state, **extra):
    ...     return jax.tree.map(lambda g: jnp.max(g, 0), grads), state
    >>> method = from_gradients("largest", lambda params: (), largest)
    >>> grads = {"w": jnp.array([[1.0], [3.0]])}
    >>> method.update(grads, method.init(None))[0]["w"].tolist()
    [3.0]
    """

    def init_fn(params):
        return AggregationState(method=init(params), finite=jnp.asarray(True))

    def update_fn(updates, state, params=None, **extra):
        count = check_task_grads(name, updates, params)
        out, method = update(updates, state.method, **extra)
        if not robust:
            # In the pass that forms `out`, not in one more over all gradients.
            zero = tree.combine(updates, jnp.zeros(count))
            out = jax.tree.map(_nan_unless_finite, out, zero)
        return out, AggregationState(method=method, finite=all_finite(out))

    return Aggregator(
        init_fn,
        update_fn,
        rule,
        heads=heads,
        per_parameter=per_parameter,
        wants=wants,
    )


def _nan_unless_finite(out: chex.Array, zero: chex.Array) -> chex.Array:
    """`out` where `zero`, its rows summed up times zero, is no NaN."""
    return jnp.where(zero == 0, out, jnp.nan) if tree.is_inexact(out) else out


def from_gramian(name: str, rule: Rule, *, heads: Heads | None = None) -> Aggregator:
    """Lifts a weight rule to a transformation that can head an `optax.chain`.

    Args:
      name: of the public function, for error messages.
      rule: weights from the Gramian of the task gradients; one that does not read it
        gets zeros, so that the gradients are read once.
      heads: see `Aggregator`.

    Returns:
      An `Aggregator` whose updates are `sum_t weights[t] * task_grads[t]`, computed in
      float32 and cast once.

    >>> def shortest(gram):
    ...     return jnp.eye(len(gram))[jnp.argmin(jnp.diag(gram))]
    >>> method = from_gramian("shortest", stateless(shortest))
    >>> grads = {"w": jnp.array([[1.0], [3.0]])}
    >>> method.update(grads, method.init(None))[0]["w"].tolist()
    [1.0]
    """

    def init_fn(params):
        del params
        return AggregationState(method=rule.init(), finite=jnp.asarray(True))

    def update_fn(updates, state, params=None, **extra):
        count = check_task_grads(name, updates, params)
        formed = "gram" in rule.reads
        gram = tree.gram(updates) if formed else jnp.zeros((count, count))
        weights, method = rule.weigh(gram, state.method, **extra)
        out = tree.combine(updates, weights)
        # NaN and infinity reach the Gramian, and the sum whatever its weights.
        finite = jnp.all(jnp.isfinite(gram)) if formed else all_finite(out)
        return out, AggregationState(method=method, finite=finite)

    return Aggregator(init_fn, update_fn, rule, heads=heads)


def check_task_grads(name: str, task_grads: Any, params: Any = None) -> int:
    """T of task gradients.

    Args:
      name: of the public function, for error messages.
      task_grads: tree with leaves [T, ...].
      params: tree with leaves [...], or None.

    Raises:
      ValueError: leaves without one common task axis, or that do not fit `params`.
    """
    count = tree.num_tasks(name, task_grads)
    if params is not None:
        first = jax.eval_shape(lambda g: jax.tree.map(lambda x: x[0], g), task_grads)
        tree.check_match(
            name,
            params,
            first,
            reference_name="params",
            other_name="one task of updates",
        )
    return count


def all_finite(task_grads: Any) -> chex.Array:
    """Whether no leaf holds NaN or infinity: a bool scalar, safe under jit."""
    # A sum of zeros reads each leaf once and stores nothing; NaN and infinity survive.
    found = [jnp.sum(x * 0) for x in jax.tree.leaves(task_grads) if tree.is_inexact(x)]
    return jnp.all(jnp.isfinite(jnp.stack([x.astype(jnp.float32) for x in found])))


def gram_of(name: str, gram: Any) -> chex.Array:
    """A Gramian as float32, refused unless it is a square matrix.

    Raises:
      ValueError: the shape is not [T, T] with T of 1 or more.
    """
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.shape[0]:
        raise ValueError(f"{name}: gram is {gram.shape}, wanted [T, T]")
    return gram.astype(tree.wide_dtype(gram.dtype))


def stateless(
    weights: Callable[..., chex.Array], *, reads: tuple[str, ...] = ("gram",)
) -> Rule:
    """The rule of a method whose weights are a function of the Gramian alone.

    With `reads=()`, of its shape alone.
    """
    return Rule(lambda: (), lambda gram, state, **extra: (weights(gram), state), reads)
