"""What can be trained: the one value every trainable system hands to the trainer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import optax
from jax.sharding import PartitionSpec

LossFn = Callable[
    [chex.ArrayTree, Any, chex.PRNGKey], tuple[chex.Array, dict[str, chex.Array]]
]
Rules = tuple[tuple[str, PartitionSpec], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainable:
    """Parameters, a loss and an optimizer.

    Attributes:
      init: `init(key) -> params`; traceable. Weights that were loaded from a file go
        to `Trainer.fit(params=...)` instead, where they are not baked into a program.
      loss_fn: `loss_fn(params, batch, key) -> (loss, metrics)`; a scalar that is a mean
        over the examples of the batch, and a dict of scalars.
      tx: optax transformation; sees the trained leaves only (frozen ones are None).
      rules: ordered (regex, PartitionSpec) pairs on leaf paths; the first one found in
        a path wins, and together they must cover every leaf.
      frozen: regexes on leaf paths; these leaves get no gradient, no optimizer state
        and no update.
    """

    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    loss_fn: LossFn
    tx: optax.GradientTransformation
    rules: Rules = ((".*", PartitionSpec()),)
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("init", "loss_fn"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"Trainable: {name} wants a callable, found {getattr(self, name)!r}"
                )
        if isinstance(self.frozen, str):
            raise ValueError(
                "Trainable: frozen wants a tuple of regexes, "
                f"found the string {self.frozen!r}"
            )
