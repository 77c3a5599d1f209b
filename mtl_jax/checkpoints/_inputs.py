"""Checkpoints of a merge: opened, tied heads found, vocabularies matched."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.checkpoints import _layers, _row_maps, _rows, tokens
from mtl_jax.checkpoints._schema import Model, Recipe
from mtl_jax.checkpoints.source import Source, TensorView, open_source

__all__ = ["Checkpoint", "Inputs", "open_inputs"]

_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|proj_out|vocab_projector|"
    r"cls\.predictions\.decoder|lm_head\.(decoder|linear))\.(weight|bias)$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings|"
    r"backbone\.embeddings)\.weight$"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One model: what it is, and its tensors as the merge sees them."""

    model: Model
    source: Source
    tensors: Mapping[str, TensorView]

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; empty if there is none."""
        return self.source.config or {}

    @property
    def stacks(self) -> tuple[_layers.Stack, ...]:
        """Its stacks of layers."""
        return _layers.find_stacks(self.tensors, self.source.config)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All models of a recipe.

    Attributes:
      checkpoints: by model, the donor of config and tokenizer first.
      vocabulary: tokens of the output, where the recipe asks for a tokenizer.
      donor_ids: tokens of the donor, where they were read.
      mapping: digest of how rows were mapped.
      untied: whether an output head was separated from the embeddings.
      notes: what the user should know.
    """

    checkpoints: Mapping[Model, Checkpoint]
    vocabulary: tokens.OutputVocabulary | None
    donor_ids: Mapping[str, int]
    mapping: str
    untied: bool
    notes: tuple[str, ...]

    @property
    def donor(self) -> Checkpoint:
        """The model whose config and tokenizer the output has."""
        return next(iter(self.checkpoints.values()))


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens and checks every model of a recipe.

    Raises:
      ValueError: for a broken checkpoint, or tokenizers that differ although the
        recipe does not say how they are matched.
      FileNotFoundError: if there is nothing to open.
    """
    found = [_open(model) for model in recipe.models()]
    untied = _match_heads(found)
    notes: list[str] = []
    vocabulary, ids, mapping = None, {}, ""
    if recipe.tokenizer is None:
        tokens.check_same(
            [c.model for c in found], [c.source.side_files for c in found]
        )
    else:
        vocabulary, ids, mapping = _match_vocabularies(recipe, found, notes)
    return Inputs(
        checkpoints={c.model: c for c in found},
        vocabulary=vocabulary,
        donor_ids=ids,
        mapping=mapping,
        untied=untied,
        notes=(*recipe.notes, *notes),
    )


def _open(model: Model) -> Checkpoint:
    source = open_source(model.path)
    if "peft_type" in (source.config or {}):
        raise ValueError(
            f"merge: {model} is an adapter alone: sums of its factors are not sums of "
            f"models; write BASE+{model}"
        )
    return Checkpoint(model, source, dict(source))


def _match_heads(found: list[Checkpoint]) -> bool:
    """Tied output heads: absent where every model ties, views where one does not.

    Returns whether a head that some model ties has its own values in the output.
    """
    every = dict.fromkeys(name for c in found for name in c.tensors)
    untied = False
    for name in every:
        have = [c for c in found if name in c.tensors]
        if len(have) == len(found) or not (
            _HEAD.search(name) or _EMBEDDING.search(name)
        ):
            continue
        lack = [(i, c) for i, c in enumerate(found) if name not in c.tensors]
        views = {i: _tied(c, name) for i, c in lack}
        if any(view is None for view in views.values()):
            continue  # A tensor that is missing: the plan refuses it.
        if all(_ties(c, name) for c in have):
            for i, c in enumerate(found):
                found[i] = dataclasses.replace(
                    c, tensors={k: v for k, v in c.tensors.items() if k != name}
                )
            continue
        untied = True
        for i, c in lack:
            found[i] = dataclasses.replace(c, tensors={**c.tensors, name: views[i]})
    return untied


def _ties(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a checkpoint's config makes a tensor a copy of the embeddings."""
    if name.endswith("embed_tokens.weight") and "shared.weight" in checkpoint.tensors:
        return True
    config = checkpoint.config
    inner = config.get("text_config", config)
    default = name not in checkpoint.tensors
    return bool(
        config.get("tie_word_embeddings", inner.get("tie_word_embeddings", default))
    )


def _tied(checkpoint: Checkpoint, name: str) -> TensorView | None:
    """The embeddings that stand for a tensor that is not there."""
    if not name.endswith(".weight") or not _ties(checkpoint, name):
        return None
    tables = [n for n in checkpoint.tensors if _EMBEDDING.search(n)]
    return checkpoint.tensors[tables[0]] if len(tables) == 1 else None


def _rows_of(checkpoint: Checkpoint) -> int | None:
    """How many rows the embeddings have, by the tensors, else by the config."""
    for name, view in checkpoint.tensors.items():
        if _EMBEDDING.search(name):
            return view.spec.shape[0]
    config = checkpoint.config
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))


def _vocabulary_tensors(checkpoint: Checkpoint, rows: int) -> list[str]:
    """Tensors outside of layers whose rows are tokens.

    By shape, unless another number of the config equals the number of rows; then by
    name.
    """
    stacks = checkpoint.stacks
    by_name = rows in _other_numbers(checkpoint) or not checkpoint.config
    return [
        name
        for name, view in checkpoint.tensors.items()
        if view.spec.shape
        and view.spec.shape[0] == rows
        and _layers.place(name, stacks) is None
        and (not by_name or _HEAD.search(name) or _EMBEDDING.search(name))
    ]


def _refuse_columns(checkpoint: Checkpoint, rows: int) -> None:
    """Refuses tokens along another axis, which no map of rows would move.

    Raises:
      ValueError: for a tensor such as `final_logits_bias` [1, vocabulary], by name.
    """
    numbers = _other_numbers(checkpoint)
    for name, view in checkpoint.tensors.items():
        shape = tuple(view.spec.shape)
        if rows not in shape[1:] or shape[0] == rows:
            continue
        if _layers.place(name, checkpoint.stacks) is not None:
            continue
        if rows not in numbers or "logits_bias" in name:
            raise ValueError(
                f"merge: {name!r} of {checkpoint.model} is {list(shape)}: its {rows} "
                "tokens are not rows, which is all that tokenizer_source and tokenizer "
                "can match"
            )


def _other_numbers(checkpoint: Checkpoint) -> list[Any]:
    """Values of the config that do not count or name tokens."""
    return [
        value
        for key, value in _flat(checkpoint.config)
        if key != "vocab_size" and not key.endswith("_token_id")
    ]


def _flat(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    out = []
    for key, value in config.items():
        out += _flat(value) if isinstance(value, Mapping) else [(key, value)]
    return out


def _match_vocabularies(
    recipe: Recipe, found: list[Checkpoint], notes: list[str]
) -> tuple[tokens.OutputVocabulary, Mapping[str, int], str]:
    """Puts views of mapped rows in place of the vocabulary tensors of every model."""
    request = recipe.tokenizer
    if request is None:
        raise ValueError("merge: no tokenizer is asked for")
    vocabularies = _read_vocabularies(found, notes)
    donor = vocabularies[0]
    if isinstance(request.source, Model):
        donor = _read_other(request.source, vocabularies)
    output = tokens.join(request, vocabularies, donor)
    base = 0 if recipe.base else None
    maps = _row_maps.row_maps(request, output, vocabularies, base)
    names = [
        _vocabulary_tensors(c, v.rows) for c, v in zip(found, vocabularies, strict=True)
    ]
    originals = [c.tensors for c in found]
    for own, checkpoint in enumerate(found):
        changed = {}
        if maps[own].is_identity(own, vocabularies[own].rows):
            continue
        _refuse_columns(checkpoint, vocabularies[own].rows)
        for name in names[own]:
            lacking = [
                str(c.model)
                for c, there in zip(found, names, strict=True)
                if name not in there
            ]
            if lacking:
                raise ValueError(
                    f"merge: {name!r} has one row per token in {checkpoint.model}, "
                    f"but not in {', '.join(lacking)}"
                )
            views = [tensors[name] for tensors in originals]
            widths = {math.prod(view.spec.shape[1:]) for view in views}
            if len(widths) > 1:
                continue  # Shapes that differ in more than rows: the plan refuses.
            changed[name] = _rows.RowsView(views, own, maps[own])
        found[own] = dataclasses.replace(
            checkpoint, tensors={**checkpoint.tensors, **changed}
        )
    return output, vocabularies[0].ids, _rows.digest(maps)


def _read_vocabularies(
    found: Sequence[Checkpoint], notes: list[str]
) -> list[tokens.Vocabulary]:
    out: list[tokens.Vocabulary] = []
    for checkpoint in found:
        model, rows = checkpoint.model, _rows_of(checkpoint)
        read = tokens.read_vocabulary(model, checkpoint.source.side_files, rows)
        if read is None:
            if not out or out[0].rows != (rows or out[0].rows):
                raise ValueError(f"merge: {model} has no tokenizer")
            read = dataclasses.replace(out[0], model=model)
            notes.append(f"{model} has no tokenizer: that of {out[0].model} is assumed")
        out.append(read)
    return out


def _read_other(
    model: Model, vocabularies: Sequence[tokens.Vocabulary]
) -> tokens.Vocabulary:
    """The vocabulary of the model that a recipe names, whether it takes part or not."""
    for vocabulary in vocabularies:
        if vocabulary.model == model:
            return vocabulary
    read = tokens.read_vocabulary(model, tokens.tokenizer_files(model.path), None)
    if read is None:
        raise ValueError(f"merge: tokenizer_source: {model} has no tokenizer")
    return read
