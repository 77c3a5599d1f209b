"""What a recipe says, as values."""

import dataclasses
from collections.abc import Mapping

__all__ = [
    "DTYPES",
    "Conditional",
    "Input",
    "Model",
    "Module",
    "Parameters",
    "Recipe",
    "Scalar",
    "Setting",
    "Slice",
    "TokenSource",
    "TokenizerRequest",
]

DTYPES = ("bfloat16", "float16", "float32")

Scalar = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A value for tensors whose name contains `filter`; None or `*`: for all."""

    filter: str | None
    value: "Scalar | tuple[Scalar, ...]"


Setting = Scalar | tuple[Scalar, ...] | tuple[Conditional, ...]
Parameters = Mapping[str, Setting]


@dataclasses.dataclass(frozen=True)
class Model:
    """A local checkpoint, perhaps with an adapter: two are the same by `path`.

    Attributes:
      path: what `open_source` opens.
      text: as the recipe writes it.
    """

    path: str
    text: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Input:
    """A model that takes part, its own parameters, and which layers of it."""

    model: Model
    parameters: Parameters
    layers: tuple[int, int] | None
    where: str


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, merged from as many of each source."""

    sources: tuple[Input, ...]
    base: Model | None
    parameters: Parameters
    where: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A part of the output: whole models, or slices of layers."""

    name: str | None
    models: tuple[Input, ...]
    slices: tuple[Slice, ...]
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """Where the row of a token comes from.

    Attributes:
      kind: `default`, `zero`, `model` (the row of the same token), or `model_token`.
      force: for models that have the token, too.
    """

    kind: str
    force: bool = False
    model: Model | None = None
    token: str | None = None
    token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerRequest:
    """Which tokenizer the output has: `base`, `union`, or that of a model."""

    source: str | Model
    tokens: Mapping[str, TokenSource] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A merge, as read; nothing has been opened yet.

    Attributes:
      text: the file, for the record.
      notes: what was read and has no effect.
    """

    name: str
    text: str
    method: str
    base: Model | None
    modules: tuple[Module, ...]
    parameters: Parameters
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerRequest | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def models(self) -> tuple[Model, ...]:
        """Every model that takes part: the base first, then as they appear."""
        found = [self.base] if self.base else []
        for module in self.modules:
            found += [entry.model for entry in module.models]
            for part in module.slices:
                found += [part.base] if part.base else []
                found += [entry.model for entry in part.sources]
        return tuple(dict.fromkeys(found))
