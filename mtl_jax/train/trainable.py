"""What can be trained: the one value every trainable system hands to the trainer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import optax
from jax.sharding import PartitionSpec

from mtl_jax.transforms.aggregation import Aggregator, SplitLoss
from mtl_jax.transforms.aggregation._engines import check_chunk

LossFn = Callable[
    [chex.ArrayTree, Any, chex.PRNGKey], tuple[chex.Array, dict[str, chex.Array]]
]
Rules = tuple[tuple[str, PartitionSpec], ...]

ENGINES = ("auto", "map", "vmap", "gramian", "features", "flat", "bilevel")
SHARPNESS = ("batch", "microbatch")
CROSS = ("auto", "map", "vmap")  # Engines that compare two halves of a batch.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainable:
    """Parameters, a loss and an optimizer.

    With an `aggregator`, `loss_fn` returns one loss per task instead of one loss; the
    aggregator makes one gradient of theirs, which `tx` then sees. Metrics get
    `loss_<task>` and, where the method has them, `weight_<task>`; `loss` is the sum.

    Attributes:
      init: `init(key) -> params`; traceable. Weights that were loaded from a file go
        to `Trainer.fit(params=...)` instead, where they are not baked into a program.
      loss_fn: `loss_fn(params, batch, key) -> (loss, metrics)`; a scalar that is a mean
        over the examples of the batch ([T] such means with an aggregator), and a dict
        of scalars.
      tx: optax transformation; sees the trained leaves only (frozen ones are None).
      rules: ordered (regex, PartitionSpec) pairs on leaf paths; the first one found in
        a path wins, and together they must cover every leaf.
      frozen: regexes on leaf paths; these leaves get no gradient, no optimizer state
        and no update.
      aggregator: transformation of task gradients, see `mtl_jax.aggregation`; None
        for a scalar loss.
      shared: regexes on leaf paths: what the aggregator acts on. Other leaves, such
        as those of heads, get the sum of the task gradients; weighed, where the method
        has a say in it (`aggregation.Aggregator.heads`), as weightings do.
      grads: how task gradients are had. "map": one after another. "vmap": all at once.
        "gramian": never formed, for methods that need inner products only; saves the
        memory of T gradients, and costs about twice the products of "map". "auto": not
        at all for methods whose weights need no gradient (see `aggregation.Rule`), such
        as weightings of losses, for the price of one backward pass and without the
        metrics of conflicts; else "map" while all task gradients of the shared leaves
        take up to 1 GiB, then "gramian" where method and model allow it. "features":
        the aggregator acts on the gradients at the shared representation of a
        `aggregation.SplitLoss`, for the price of one backward pass. "flat": each
        task's at the parameters and where its loss is worst within `radii`, for an
        `aggregation.flat_mtl`. "bilevel": by a `bilevel.as_aggregator`; one half of the
        batch moves the model, the other the weights of its tasks; for all leaves, so it
        takes no `shared`. Methods that need `cross_gram` get it from two halves of the
        batch, with "map", "vmap" or "auto"; a task that `task_counts` finds in one half
        only has zeros there, and the metric `tasks_in_one_half` counts such tasks.
      chunk: of `grads="vmap"`: how many task gradients at once; None for all.
      radii: of `grads="flat"`: for the shared leaves, and for a task's own.
      sharpness: of `grads="flat"`: whose loss is worst where tasks are moved to.
        "batch": that of the whole batch, one place for each task. "microbatch": that
        of each microbatch apart, a place each (m-sharpness, Foret et al. 2021), with
        accumulation.
      task_names: names for the metrics; the numbers from 0 by default.
      task_counts: `task_counts(batch) -> [T]`, how many rows of a batch belong to each
        task, where a task's loss is the mean over its own rows. It makes accumulation
        over microbatches of uneven counts exact, and tells weightings which tasks a
        batch lacks; None where every row belongs to every task, and so none is absent.
      task_blocks: promises that the rows of a batch are T equal blocks, those of task t
        in block t, and that the loss of a task is a mean over its own block, whatever
        the others hold. "map" and "auto" then form all task gradients for the price of
        one backward pass; metrics are means over blocks, and block t draws from
        `fold_in(key, t)`. With `task_counts` a batch laid otherwise has a loss of NaN.
    """

    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    loss_fn: LossFn
    tx: optax.GradientTransformation
    rules: Rules = ((".*", PartitionSpec()),)
    frozen: tuple[str, ...] = ()
    aggregator: optax.GradientTransformation | None = None
    shared: tuple[str, ...] = (".*",)
    grads: str = "auto"
    chunk: int | None = None
    radii: tuple[float, float] | None = None
    sharpness: str = "batch"
    task_names: tuple[str, ...] | None = None
    task_counts: Callable[[Any], chex.Array] | None = None
    task_blocks: bool = False

    def __post_init__(self):
        for name in ("init", "loss_fn"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"Trainable: {name} wants a callable, found {getattr(self, name)!r}"
                )
        for name, kind in (
            ("frozen", "regexes"),
            ("shared", "regexes"),
            ("task_names", "names"),
        ):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"Trainable: {name} wants a tuple of {kind}, "
                    f"found the string {getattr(self, name)!r}"
                )
        if self.aggregator is None:
            self._check_plain()
        else:
            self._check_per_task()

    def _check_plain(self):
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        for name in (
            "shared",
            "grads",
            "chunk",
            "radii",
            "sharpness",
            "task_names",
            "task_counts",
            "task_blocks",
        ):
            if getattr(self, name) != fields[name]:
                raise ValueError(
                    f"Trainable: {name}={getattr(self, name)!r} wants an aggregator"
                )

    def _check_per_task(self):
        if not hasattr(self.aggregator, "update"):
            raise ValueError(
                "Trainable: aggregator wants a gradient transformation such as "
                f"aggregation.pcgrad(), found {self.aggregator!r}"
            )
        if self.grads not in ENGINES:
            raise ValueError(
                f"Trainable: grads is {self.grads!r}, wanted one of "
                + ", ".join(ENGINES)
            )
        if not self.shared:
            raise ValueError("Trainable: shared is empty, wanted at least one regex")
        if self.grads == "gramian" and getattr(self.aggregator, "rule", None) is None:
            raise ValueError(
                "Trainable: grads='gramian' wants an aggregator with a rule; this one "
                "needs the task gradients themselves, use 'map' or 'vmap'"
            )
        rule = getattr(self.aggregator, "rule", None)
        if "cross_gram" in getattr(rule, "reads", ()) and self.grads not in CROSS:
            raise ValueError(
                f"Trainable: grads={self.grads!r} forms no cross_gram, which this "
                f"aggregator needs; use one of {', '.join(CROSS)}"
            )
        if (self.grads == "bilevel") != hasattr(self.aggregator, "bilevel"):
            raise ValueError(
                "Trainable: grads='bilevel' goes with a bilevel.as_aggregator, found "
                f"{self.grads!r} with {type(self.aggregator).__name__}"
            )
        if self.grads == "bilevel" and self.shared != (".*",):
            raise ValueError(
                "Trainable: grads='bilevel' takes no shared: its weights are those of "
                f"the losses, for all leaves; found {self.shared!r}"
            )
        check_chunk("Trainable", self.grads, self.chunk)
        if self.sharpness not in SHARPNESS:
            raise ValueError(
                f"Trainable: sharpness is {self.sharpness!r}, wanted one of "
                + ", ".join(SHARPNESS)
            )
        if (self.grads == "flat") != (self.radii is not None):
            raise ValueError(
                f"Trainable: grads='flat' goes with radii, found {self.grads!r} with "
                f"{self.radii}"
            )
        if isinstance(self.aggregator, Aggregator):
            self._check_engine(self.aggregator)
        if self.grads == "features":
            if not isinstance(self.loss_fn, SplitLoss):
                raise ValueError(
                    "Trainable: grads='features' wants loss_fn to be an "
                    "aggregation.SplitLoss, which names the shared representation"
                )
            if self.shared != (".*",):
                raise ValueError(
                    "Trainable: grads='features' takes no shared: what the encoder "
                    "uses is shared"
                )
        self._check_names()

    def _check_engine(self, aggregator: Aggregator):
        """Refuses engines that do not make what the aggregator takes."""
        if "features" in aggregator.wants and self.grads != "features":
            raise ValueError(
                "Trainable: the aggregator wants features, so grads='features'; found "
                f"{self.grads!r}"
            )
        flat = "sam_grads" in aggregator.wants
        if (self.grads == "flat") != flat:
            raise ValueError(
                "Trainable: grads='flat' goes with an aggregation.flat_mtl, found "
                f"{self.grads!r} with one that takes {'' if flat else 'no '}sam_grads"
            )
        if self.grads == "features" and aggregator.per_parameter:
            raise ValueError(
                "Trainable: grads='features' has gradients of features, and the "
                "aggregator keeps something for every parameter, or groups them; use "
                "'map' or 'vmap'"
            )

    def _check_names(self):
        names = self.task_names
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(
                f"Trainable: task_names wants unique names, found {names!r}"
            )
