"""What a rule, its options and a job for it are."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

Scope = Literal["entry", "tensor", "model"]


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


class Spec(Protocol):
    """Shape and dtype of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its entries."""
        ...


class View(Protocol):
    """A tensor that is not read yet."""

    @property
    def spec(self) -> Spec:
        """Shape and dtype."""
        ...

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries of the flattened tensor."""
        ...

    def whole(self) -> np.ndarray:
        """All of it, in its shape."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One output tensor.

    Attributes:
      name: of the tensor.
      spec: shape and dtype to write.
      rule: key of `RULES`.
      base: where task vectors start from; None where the rule needs none.
      experts: the models, each of the shape of `spec`.
      options: resolved for this tensor; those that are per model are tuples in the
        order of `experts`, or one value for all.
      models: what messages call the experts; "expert 0", ... by default.
    """

    name: str
    spec: Spec
    rule: str
    base: View | None
    experts: tuple[View, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.spec.shape)

    @property
    def views(self) -> tuple[View, ...]:
        """The base, where there is one, and the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def model(self, index: int) -> str:
        """What to call an entry of `views`."""
        if self.base is not None:
            if index == 0:
                return "the base"
            index -= 1
        return self.models[index] if self.models else f"expert {index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a rule.

    Attributes:
      kind: float, int, bool or str.
      default: `REQUIRED` where there is none.
      per_model: one value for each expert.
      least: smallest value allowed.
      most: largest value allowed.
      choices: all values allowed; for `rescale` beside the booleans.
    """

    kind: type
    default: Any = REQUIRED
    per_model: bool = False
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[Any, ...] = ()

    def problem(self, value: Any) -> str:
        """What is wrong with a single value, as "wanted ..."; empty if nothing is."""
        if self.choices:
            fits = any(value is c or (value == c and c != 1) for c in self.choices)
            return "" if fits else f"wanted one of {self.choices}"
        if self.kind is bool:
            return "" if isinstance(value, bool | np.bool_) else "wanted true or false"
        if isinstance(value, bool | str) or not isinstance(
            value, int | float | np.integer | np.floating
        ):
            return "wanted a number"
        if self.kind is int and value != int(value):
            return "wanted an integer"
        if not math.isfinite(value):
            return "wanted a finite number"
        if not self.least <= value <= self.most:
            return f"wanted {self.least:g} to {self.most:g}"
        return ""


Test = Callable[[Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way of merging.

    Attributes:
      name: as recipes say it.
      summary: one line.
      needs_base: whether the base must be given.
      takes_base: whether it may be.
      min_experts: fewest models beside the base.
      max_experts: most of them; None for any number.
      options: by name.
      scope: "entry", "tensor" or "model"; of a rule with an option of that name, its
        widest.
      whole: whether the tensor is read as a whole.
      test: of the resolved options together; says what is wrong, or nothing.
    """

    name: str
    summary: str
    needs_base: bool = True
    takes_base: bool = True
    min_experts: int = 1
    max_experts: int | None = None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    scope: Scope = "entry"
    whole: bool = False
    test: Test = lambda options: ""
