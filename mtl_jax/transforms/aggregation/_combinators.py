"""Aggregators made of aggregators: per group, normalised, every k steps."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gradients,
    from_gramian,
)
from mtl_jax.transforms.aggregation._cr_mogm import rule_of
from mtl_jax.transforms.aggregation._extra import losses_of
from mtl_jax.transforms.aggregation._tracked import per_task, squares

NORMS = ("l2", "loss", "loss_l2")


def _stack_states(state: Any, count: int) -> Any:
    """A state per group; PRNG keys are split, all else is repeated."""

    def leaf(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(x, count)
        return jnp.broadcast_to(x, (count, *x.shape))

    return jax.tree.map(leaf, state)


def _grouped(name: str, aggregator: Any, group_leaves: Any) -> Aggregator:
    """One set of weights per group; `group_leaves(tree)` lists leaf numbers."""
    rule = rule_of(name, aggregator)
    if rule.after is not None:
        raise ValueError(f"{name}: the method looks at what every step has brought")

    def init(params):
        return _stack_states(rule.init(), len(group_leaves(params)))

    def update(task_grads, state, **extra):
        leaves, treedef = jax.tree.flatten(task_grads)
        groups = group_leaves(task_grads)
        grams = jnp.stack([tree.gram([leaves[i] for i in group]) for group in groups])
        weights, state = jax.vmap(lambda g, s: rule.weigh(g, s, **extra))(grams, state)
        row = {i: weights[k] for k, group in enumerate(groups) for i in group}
        # A leaf in no group is not floating point: its weights are not looked at.
        rows = [row.get(i, weights[0]) for i in range(len(leaves))]
        return tree.combine(task_grads, jax.tree.unflatten(treedef, rows)), state

    return from_gradients(name, init, update, per_parameter=True)


def _inexact_names(params: Any) -> dict[int, str]:
    leaves = zip(tree.paths(params), jax.tree.leaves(params), strict=True)
    return {i: name for i, (name, x) in enumerate(leaves) if tree.is_inexact(x)}


def per_leaf(aggregator: Aggregator) -> Aggregator:
    """Lets a method weigh each parameter array by its own Gramian.

    All Gramians are weighed in one batch.

    Args:
      aggregator: any method with a `rule`. Methods that work coordinate by coordinate
        (`trimmed_mean`, `grad_drop`) are the same per leaf anyway; for the others see
        `optax.partition`.

    Returns:
      An `Aggregator`. Its state has a leading axis for the leaves; PRNG keys differ
      between leaves. `losses` and `cross_gram` go to each leaf as they are.

    Raises:
      ValueError: the aggregator has no rule, or looks at what every step has brought,
        as FAMO does.

    >>> from mtl_jax.transforms.aggregation._imtl_g import imtl_g
    >>> tx = per_leaf(imtl_g())
    >>> grads = {"a": jnp.diag(jnp.array([1.0, 3.0])), "b": jnp.eye(2)}
    >>> out, _ = tx.update(grads, tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)}))
    >>> out["a"].tolist(), out["b"].tolist()
    ([0.75, 0.75], [0.5, 0.5])
    """
    return _grouped("per_leaf", aggregator, lambda t: [[i] for i in _inexact_names(t)])


def per_group(aggregator: Aggregator, patterns: Sequence[str]) -> Aggregator:
    """Lets a method weigh groups of parameters, such as layers, each by itself.

    Args:
      aggregator: any method with a `rule`.
      patterns: regular expressions on leaf names, one group each; a leaf goes to the
        first that finds it, all that none finds are one more group.

    Returns:
      An `Aggregator`, as `per_leaf` with groups for leaves.

    Raises:
      ValueError: the aggregator has no rule, or looks at what every step has brought;
        at init and update, a pattern that is left without a leaf.

    >>> from mtl_jax.transforms.aggregation._imtl_g import imtl_g
    >>> tx = per_group(imtl_g(), ["^a"])
    >>> grads = {"a": jnp.diag(jnp.array([1.0, 3.0])), "b": jnp.eye(2)}
    >>> out, _ = tx.update(grads, tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)}))
    >>> out["a"].tolist(), out["b"].tolist()
    ([0.75, 0.75], [0.5, 0.5])
    """
    patterns = tuple(patterns)

    def group_leaves(params):
        groups = [[] for _ in (*patterns, None)]
        for i, name in _inexact_names(params).items():
            found = (k for k, p in enumerate(patterns) if re.search(p, name))
            groups[next(found, len(patterns))].append(i)
        for pattern, group in zip(patterns, groups, strict=False):
            if not group:
                raise ValueError(f"per_group: {pattern!r} is left without a leaf")
        return [group for group in groups if group]

    return _grouped("per_group", aggregator, group_leaves)


def _scaled(
    name: str, aggregator: Aggregator, scale_of: Any, reads: tuple[str, ...]
) -> Aggregator:
    """Gradients times `scale_of(squared norms, extra)` [T] before the method.

    With a rule the scales D go to the Gramian, `w = D rule(D G D)`; without one they go
    to the gradients.
    """
    rule = getattr(aggregator, "rule", None)
    heads = getattr(aggregator, "heads", None)
    if rule is not None:

        def weigh(gram, state, **extra):
            scale = scale_of(jnp.diag(gram), extra).astype(gram.dtype)

            def both(products):
                return products * scale[:, None] * scale[None, :]

            if extra.get("cross_gram") is not None:
                extra["cross_gram"] = both(extra["cross_gram"])
            weights, state = rule.weigh(both(gram), state, **extra)
            return weights * scale, state

        found = tuple(dict.fromkeys((*rule.reads, *reads)))
        due = None if reads else rule.due
        scaled = Rule(rule.init, weigh, found, rule.after, due)
        return from_gramian(name, scaled, heads=heads)

    def update(task_grads, state, **extra):
        scale = scale_of(squares(task_grads), extra)

        def leaf(x):
            if not tree.is_inexact(x):
                return x
            wide = x.astype(tree.wide_dtype(x.dtype))
            return wide * per_task(scale, wide)

        scaled = jax.tree.map(leaf, task_grads)
        out, state = aggregator.update(scaled, state, None, **extra)
        return jax.tree.map(lambda o, x: o.astype(x.dtype), out, task_grads), state

    return from_gradients(
        name,
        aggregator.init,
        update,
        heads=heads,
        per_parameter=getattr(aggregator, "per_parameter", False),
        wants=getattr(aggregator, "wants", ()),
    )


def with_preference(aggregator: Aggregator, preference: Any) -> Aggregator:
    """Multiplies the task gradients by a preference before any method.

    The same as tasks of losses `preference[t] * loss[t]`. Methods whose weights undo
    the lengths of gradients (`imtl_g`, the directions of `config` and `nash_mtl`) take
    no notice; those with a preference of their own have an argument for it.

    Args:
      aggregator: any aggregator.
      preference: [T].

    Returns:
      An `Aggregator`, with a rule where the given one has it.

    Raises:
      ValueError: at update, `preference` is not [T].

    >>> from mtl_jax.transforms.aggregation._linear import sum
    >>> tx = with_preference(sum(), [1.0, 3.0])
    >>> grads = {"w": jnp.eye(2)}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
    [1.0, 3.0]
    """
    scale = np.asarray(preference, np.float32)

    def scale_of(squared, extra):
        del extra
        if scale.shape != squared.shape:
            raise ValueError(
                f"with_preference: preference is {scale.shape}, "
                f"wanted {squared.shape}, one per task"
            )
        return jnp.asarray(scale)

    return _scaled("with_preference", aggregator, scale_of, ())


def normalize(
    aggregator: Aggregator, by: Literal["l2", "loss", "loss_l2"] = "l2"
) -> Aggregator:
    """Divides each task gradient before any method sees it.

    Args:
      aggregator: any aggregator.
      by: "l2", its length; "loss", the task's loss; "loss_l2", the product of both. The
        last two need the extra argument `losses` [T], all above zero (but of tasks
        that the extra argument `present` [T] says are absent): refused by name
        where values are known, NaN under a trace.

    Returns:
      An `Aggregator` that combines the divided gradients, with a rule where the given
      one has it. A zero gradient stays zero.

    Raises:
      ValueError: unknown `by`; at update, losses missing or not above zero.

    **Follows**: Sener and Koltun 2018, "Multi-Task Learning as Multi-Objective
      Optimization", in whose code MGDA has these normalisations.

    >>> from mtl_jax.transforms.aggregation._linear import sum
    >>> tx = normalize(sum())
    >>> grads = {"w": jnp.diag(jnp.array([5.0, -0.1]))}
    >>> tx.update(grads, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4).tolist()
    [1.0, -1.0]
    """
    if by not in NORMS:
        raise ValueError(f"normalize: by is {by!r}, wanted one of {NORMS}")

    def scale_of(squared, extra):
        scale = jnp.ones_like(squared)
        if by != "loss":
            zero = squared == 0
            scale = jnp.where(zero, 0, jax.lax.rsqrt(jnp.where(zero, 1, squared)))
        if by != "l2":
            if "present" in extra and "losses" in extra:
                absent = {"losses": jnp.where(extra["present"], extra["losses"], 1)}
                extra = {**extra, **absent}
            losses = losses_of("normalize", extra, len(squared), zero=False)
            scale = scale / losses.astype(scale.dtype)
        return scale

    reads = {"l2": ("gram",), "loss": ("losses",), "loss_l2": ("gram", "losses")}
    return _scaled("normalize", aggregator, scale_of, reads[by])


class ReuseState(NamedTuple):
    """State of weights that are used for several steps.

    Attributes:
      step: int32, number of updates.
      weights: [T], in use.
      method: state of the method.
    """

    step: chex.Array
    weights: chex.Array
    method: Any


def every_k(aggregator: Aggregator, num_tasks: int, k: int) -> Aggregator:
    """Weighs at every k-th update, and uses the weights k - 1 times more.

    In between neither the Gramian nor the weights are computed, and the gradients are
    read once; the trainer then takes one backward pass of the weighed losses, whatever
    the number of tasks, and gives no metrics of conflicts in any step.

    Args:
      aggregator: any method with a `rule`.
      num_tasks: T.
      k: 1 or more.

    Returns:
      An `Aggregator` with a rule. State: a `ReuseState`.

    Raises:
      ValueError: the aggregator has no rule or looks at what every step has brought, as
        FAMO does, or `k` is below 1.

    >>> from mtl_jax.transforms.aggregation._imtl_g import imtl_g
    >>> tx = every_k(imtl_g(), num_tasks=2, k=2)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> _, state = tx.update({"w": jnp.eye(2)}, state)
    >>> tx.update({"w": jnp.diag(jnp.array([1.0, 3.0]))}, state)[0]["w"].tolist()
    [0.5, 1.5]
    """
    rule = rule_of("every_k", aggregator)
    if rule.after is not None:
        raise ValueError("every_k: the method looks at what every step has brought")
    if k < 1:
        raise ValueError(f"every_k: k is {k}, wanted 1 or more")

    def init():
        step, start = jnp.zeros((), jnp.int32), jnp.zeros(num_tasks, jnp.float32)
        return ReuseState(step, start, rule.init())

    def due(state):
        return state.step % k == 0

    def weights_from(gram_of, state, extra):
        def weigh():
            found, method = rule.weigh(gram_of(), state.method, **extra)
            return found.astype(jnp.float32), method

        def keep():
            return state.weights, state.method

        weights, method = jax.lax.cond(due(state), weigh, keep)
        return weights, ReuseState(state.step + 1, weights, method)

    def update(task_grads, state, **extra):
        found, state = weights_from(lambda: tree.gram(task_grads), state, extra)
        return tree.combine(task_grads, found), state

    def weigh(gram, state, **extra):
        return weights_from(lambda: gram, state, extra)

    return from_gradients(
        "every_k",
        lambda params: init(),
        update,
        rule=Rule(init, weigh, rule.reads, due=due if k > 1 else None),
        heads=getattr(aggregator, "heads", None),
    )
