"""What a multi-task method is to a comparison: how T losses become one update."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import optax

from mtl_jax import train
from mtl_jax.multitask import provenance
from mtl_jax.multitask.problem import Problem
from mtl_jax.transforms import aggregation, weighting
from mtl_jax.transforms import bilevel as bilevel_lib

Measure = Callable[[Problem, chex.ArrayTree], float]
Make = Callable[[Problem, optax.GradientTransformation], train.Trainable]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train all tasks of a problem.

    Attributes:
      name: of the method and its settings; unique in a row.
      make: `make(problem, optimizer) -> Trainable`.
      about: plain data that tell this method from every other; part of the address of
        its results.
      tasks: names of the tasks that it trains; None for all. `make` sees a problem of
        these only.
      draws: how many times the rows of a batch each step gets.
      code: digest of the file of the function that it is made from.
    """

    name: str
    make: Make
    about: Mapping[str, Any]
    tasks: tuple[str, ...] | None = None
    draws: int = 1
    code: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      name: unique in the comparison.
      candidates: where there are several, the one with the best mean relative change
        against the single tasks on validation data is reported.
    """

    name: str
    candidates: tuple[Method, ...]

    def __post_init__(self):
        if not self.candidates:
            raise ValueError(f"row {self.name!r}: wants at least one candidate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """A system that trains, beside what it is measured against.

    Attributes:
      rows: the lines of the table, in order. Single tasks, equal weights and tuned
        weights come by themselves, see `baselines`.
      measures: name -> `measure(problem, params) -> float`, taken at the end of every
        training; the name is part of its address.
      analyses: `analysis(comparison) -> None`, called in order after the table; each
        adds its own claims and sections.
    """

    rows: tuple[Row, ...]
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    analyses: tuple[Callable[[Any], None], ...] = ()

    def __post_init__(self):
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"Contest: rows wants unique names, found {twice} twice")


def _plain(problem: Problem, loss_fn: Any, tx: Any, **options: Any) -> train.Trainable:
    if problem.own_rows and "aggregator" in options:
        options["task_counts"] = problem.task_counts
        # As `Bench` lays its batches; a penalty reads the rows of all tasks.
        options["task_blocks"] = not problem.has_penalty
    return train.Trainable(
        init=problem.init,
        loss_fn=loss_fn,
        tx=tx,
        rules=problem.rules,
        frozen=problem.frozen,
        **options,
    )


def scalarised(weights: Sequence[float], name: str = "") -> Method:
    """Minimises a fixed weighted sum of the losses; one backward pass.

    Where rows belong to tasks, microbatches weigh each task by the rows that they have
    of it, so that their mean is the gradient of the whole batch.

    Args:
      weights: one per task.
      name: the weights by default.
    """

    def make(problem, tx):
        if len(weights) != len(problem.targets):
            raise ValueError(
                f"scalarised: {len(weights)} weights for {len(problem.targets)} tasks"
            )
        if problem.own_rows:
            fixed = aggregation.constant(weights)
            names = problem.task_names
            return _plain(
                problem, problem.loss_fn, tx, aggregator=fixed, task_names=names
            )

        def loss_fn(params, batch, key):
            found, metrics = problem.loss_fn(params, batch, key)
            return jnp.sum(jnp.asarray(weights, jnp.float32) * found), metrics

        return _plain(problem, loss_fn, tx)

    text = " ".join(f"{w:g}" for w in weights)
    return Method(name=name or text, make=make, about={"weights": list(weights)})


def aggregated(
    name: str,
    aggregator: Callable[..., aggregation.Aggregator | weighting.Weighting],
    *,
    grads: str = "auto",
    radii: tuple[float, float] | None = None,
    draws: int = 1,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Method:
    """Combines the gradients of the shared parameters by an aggregator.

    Those of heads are added up. A weighting weighs the losses, so heads as well.

    Args:
      name: of the row.
      aggregator: a factory of `mtl_jax.aggregation`, or one of `mtl_jax.weighting`.
        One that wants `num_tasks` gets it from the problem.
      grads: engine, see `train.Trainable`.
      radii: of `grads="flat"`.
      draws: 2 for methods that compare two batches, such as `aggregation.modo`, so that
        each has as many rows as the batch of other methods; the update is their mean.
      about: plain data that tell this method from every other, instead of the
        factory's name and options; a factory that is a lambda, a partial or made inside
        a function wants it.
      **options: of the factory.

    Raises:
      ValueError: a factory whose name does not tell it from others, without `about`.
    """

    def make(problem, tx):
        made, shared = _make(aggregator, problem, options)
        return _plain(
            problem,
            problem.loss_fn,
            tx,
            aggregator=made,
            shared=shared,
            grads=grads,
            radii=radii,
            task_names=problem.task_names,
        )

    if about is None:
        about = {**_address(name, aggregator), "options": options, "grads": grads}
        if radii is not None:
            about["radii"] = list(radii)
        if draws > 1:
            about["draws"] = draws
    code = provenance.function_digest(aggregator)
    return Method(name=name, make=make, about=about, draws=draws, code=code)


def _address(name: str, factory: Any) -> dict[str, str]:
    """What the factory is called, and where."""
    module = getattr(factory, "__module__", None)
    called = getattr(factory, "__qualname__", "<")
    if module is None or "<" in called:
        raise ValueError(
            f"method {name!r}: {called if called != '<' else factory!r} is no name "
            "to remember results by, give `about`"
        )
    for kind in (aggregation, weighting, bilevel_lib):
        if module.startswith(f"{kind.__name__}."):
            return {kind.__name__.split(".")[-1]: called}
    return {"factory": f"{module}.{called}"}


def _make(
    factory: Any, problem: Problem, options: Mapping[str, Any]
) -> tuple[aggregation.Aggregator, tuple[str, ...]]:
    """The aggregator, and the leaves that it acts on."""
    count = len(problem.targets)
    if "num_tasks" in inspect.signature(factory).parameters:
        options = {"num_tasks": count, **options}
    made = factory(**options)
    if isinstance(made, weighting.Weighting):
        # Norms are those of shared leaves; otherwise one pass serves all leaves.
        acts_on = problem.model.shared_paths if "norms" in made.needs else (".*",)
        return weighting.as_aggregator(made, count), acts_on
    return made, problem.model.shared_paths


def bilevel(
    name: str,
    factory: Callable[..., bilevel_lib.Bilevel],
    *,
    draws: int = 2,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Method:
    """Learns task weights on rows that the model does not see in the same step.

    Each step gets `draws` batches of training rows at once. One half of them moves the
    model, the other is the held-out one. The validation split is never touched: it
    chooses between methods. With two draws, as the authors' code of Auto-Lambda has it,
    the model moves by as many rows as with other methods. MOML and FORUM hold out a
    part of the training set for the whole training; LibMTL gives the inner and the
    outer problem half a batch each, for all three.

    Args:
      name: of the row.
      factory: of `mtl_jax.bilevel`: `factory(loss_fn, **options) -> Bilevel`.
      draws: 2, or 1 for the halves of one batch.
      about: as in `aggregated`.
      **options: of the factory.

    Raises:
      ValueError: as `aggregated`.
    """

    def make(problem, tx):
        count = len(problem.targets)
        return _plain(
            problem,
            problem.loss_fn,
            tx,
            aggregator=bilevel_lib.as_aggregator(factory, count, **options),
            grads="bilevel",
            task_names=problem.task_names,
        )

    if about is None:
        about = {**_address(name, factory), "options": options, "draws": draws}
    code = provenance.function_digest(factory)
    return Method(name=name, make=make, about=about, draws=draws, code=code)


def regularised(
    name: str,
    total: Callable[[Problem, chex.ArrayTree, Any, chex.PRNGKey], Any],
    about: Mapping[str, Any],
) -> Method:
    """Minimises one scalar made from the whole problem.

    Args:
      name: of the row.
      total: `total(problem, params, batch, key) -> (loss, metrics)`.
      about: plain data that tell `total` from every other.
    """

    def make(problem, tx):
        def loss_fn(params, batch, key):
            return total(problem, params, batch, key)

        return _plain(problem, loss_fn, tx)

    code = provenance.function_digest(total)
    return Method(name=name, make=make, about=dict(about), code=code)


def single(task: str) -> Method:
    """One task alone, with a model of its own."""
    return dataclasses.replace(scalarised((1.0,)), name=task, tasks=(task,))


def simplex(num_tasks: int, steps: int) -> tuple[tuple[float, ...], ...]:
    """Weights to tune over: interior grid points of the simplex, times T.

    Args:
      num_tasks: T.
      steps: parts that the simplex is cut into; above T, or only equal weights are
        left.

    Returns:
      Tuples of T positive weights that sum to T.

    >>> simplex(2, 4)
    ((0.5, 1.5), (1.0, 1.0), (1.5, 0.5))
    """

    def parts(tasks, left):
        if tasks == 1:
            return [(left,)]
        return [
            (first, *rest)
            for first in range(1, left - tasks + 2)
            for rest in parts(tasks - 1, left - first)
        ]

    if steps <= num_tasks:
        return ((1.0,) * num_tasks,)
    return tuple(
        tuple(num_tasks * part / steps for part in point)
        for point in parts(num_tasks, steps)
    )


def baselines(num_tasks: int, steps: int) -> tuple[Row, ...]:
    """Equal weights, and those of the grid that validation chooses; see `simplex`.

    Equal weights are among the candidates.
    """
    equal = scalarised((1.0,) * num_tasks)
    grid = simplex(num_tasks, steps)
    others = [weights for weights in grid if len(set(weights)) > 1]
    tuned = (equal, *(scalarised(weights) for weights in others))
    return (
        Row(name="equal weights", candidates=(equal,)),
        Row(name="tuned weights", candidates=tuned),
    )
