"""CR-MOGM, a moving average of the weights of any Gramian method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
)


class AverageState(NamedTuple):
    """State of a moving average of weights.

    Attributes:
      step: int32, number of updates.
      weights: [T], the average.
      method: state of the averaged method.
    """

    step: chex.Array
    weights: chex.Array
    method: Any


def rule_of(name: str, aggregator: Any) -> Rule:
    """The rule of a Gramian method.

    Raises:
      ValueError: the aggregator has none.
    """
    rule = getattr(aggregator, "rule", None)
    if rule is None:
        raise ValueError(
            f"{name}: wanted a method with weights from the Gramian (its `rule`); "
            "this one needs the gradients themselves"
        )
    return rule


def cr_mogm(
    aggregator: Aggregator,
    num_tasks: int,
    *,
    decay: float | Callable[[chex.Array], chex.Array] = 0.9,
    initial: Any = None,
) -> Aggregator:
    r"""Smooths the weights of another method, `l <- a l + (1 - a) weights(gram)`.

    Updates: leaves [T, ...] -> [...]. State: an `AverageState`.

    Args:
      aggregator: any method with a `rule`.
      num_tasks: T.
      decay: a in [0, 1], or a function of the step number (an optax schedule); the
        paper's analysis lets it grow as the learning rate falls.
      initial: [T], l before the first step; the first weights themselves where None.

    Raises:
      ValueError: the aggregator has no rule, `decay` is out of range, or `initial` is
        not [T].

    **Follows**: Zhou et al. 2022, "On the Convergence of Stochastic Multi-Objective
      Gradient Manipulation and Beyond", alg. 2.
    **Differs**: without `initial` the average starts from the first weights.

    >>> from mtl_jax.transforms.aggregation._constant import constant
    >>> tx = cr_mogm(constant([1.0, 1.0]), 2, decay=0.75, initial=[0.0, 2.0])
    >>> grads = {"w": jnp.eye(2)}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [0.25, 1.75]
    """
    rule = rule_of("cr_mogm", aggregator)
    if not callable(decay) and not 0 <= decay <= 1:
        raise ValueError(f"cr_mogm: decay is {decay}, wanted 0 <= decay <= 1")
    if initial is not None and np.shape(initial) != (num_tasks,):
        raise ValueError(
            f"cr_mogm: initial is {np.shape(initial)}, wanted ({num_tasks},)"
        )

    def init():
        start = jnp.zeros(num_tasks) if initial is None else jnp.asarray(initial)
        step = jnp.zeros((), jnp.int32)
        return AverageState(step, start.astype(jnp.float32), rule.init())

    def weigh(gram, state, **extra):
        found, method = rule.weigh(gram, state.method, **extra)
        kept = decay(state.step) if callable(decay) else decay
        average = kept * state.weights + (1 - kept) * found.astype(jnp.float32)
        if initial is None:
            average = jnp.where(state.step == 0, found, average)
        return average, AverageState(state.step + 1, average, method)

    after = None
    if rule.after is not None:
        learn = rule.after

        def after(state, losses):
            return state._replace(method=learn(state.method, losses))

    return from_gramian("cr_mogm", Rule(init, weigh, rule.reads, after))
