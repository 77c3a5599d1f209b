"""Where the rows of embeddings come from when vocabularies are matched."""

from collections.abc import Sequence

import numpy as np

from mtl_jax.checkpoints import _rows
from mtl_jax.checkpoints._schema import TokenizerRequest, TokenSource
from mtl_jax.checkpoints.tokens import OutputVocabulary, Vocabulary

__all__ = ["row_maps"]


def row_maps(
    request: TokenizerRequest,
    output: OutputVocabulary,
    vocabularies: Sequence[Vocabulary],
    base: int | None,
) -> list[_rows.RowMap]:
    """Where the rows of every model's embeddings come from, in the output's order.

    A model that has a token gives its own row, unless the token's source is forced. A
    token that a model lacks has the row of its source; without one that is, as in
    mergekit, the one model that has it, else the base if it has it, else the average
    over the models that have it; zero if none does. Ids without a token keep the
    model's own row, else the base's; beyond those the mean of all tokens' rows.

    Args:
      request: what the recipe asks for.
      output: tokens of the output.
      vocabularies: of the models, in the order of positions.
      base: position of the base.

    Returns:
      One map per model.

    Raises:
      ValueError: for a source that lacks the token, by name.
    """
    averages: list[tuple[tuple[int, int], ...]] = []
    default_donor = np.full(output.rows, _rows.MEAN, np.int32)
    default_row = np.zeros(output.rows, np.int64)
    forced = np.zeros(output.rows, bool)
    taken = np.zeros(output.rows, bool)
    for token, i in output.ids.items():
        if i >= output.rows:
            continue
        taken[i] = True
        source = request.tokens.get(token, TokenSource("default"))
        forced[i] = source.force
        default_donor[i], default_row[i] = _default(
            token, source, vocabularies, base, averages
        )
    maps = []
    for own, vocabulary in enumerate(vocabularies):
        donor, row = default_donor.copy(), default_row.copy()
        for token, i in output.ids.items():
            at = vocabulary.usable(token)
            if i < output.rows and at is not None and not forced[i]:
                donor[i], row[i] = own, at
        for other in (own, base if base is not None else 0):
            _fill_free(donor, row, taken, other, vocabularies[other])
        maps.append(_rows.RowMap(donor, row, tuple(averages), _named(donor)))
    return maps


def _named(donor: np.ndarray) -> int:
    """Rows before the first that is padding with the mean."""
    padding = np.flatnonzero(donor == _rows.MEAN)
    return int(padding[0]) if len(padding) else len(donor)


def _fill_free(
    donor: np.ndarray,
    row: np.ndarray,
    taken: np.ndarray,
    model: int,
    vocabulary: Vocabulary,
) -> None:
    """Rows without a token, from the same rows of a model where it has no token."""
    used = np.zeros(len(donor), bool)
    there = np.fromiter(vocabulary.ids.values(), np.int64, len(vocabulary.ids))
    used[there[there < len(donor)]] = True
    free = ~taken & ~used & (donor == _rows.MEAN)
    free[vocabulary.rows :] = False
    donor[free] = model
    row[free] = np.flatnonzero(free)


def _default(
    token: str,
    source: TokenSource,
    vocabularies: Sequence[Vocabulary],
    base: int | None,
    averages: list[tuple[tuple[int, int], ...]],
) -> tuple[int, int]:
    """Donor and row of a token for models that lack it."""
    if source.kind == "zero":
        return _rows.ZERO, 0
    if source.kind in ("model", "model_token"):
        return _named_source(token, source, vocabularies)
    have = [
        (m, row)
        for m, v in enumerate(vocabularies)
        if (row := v.usable(token)) is not None
    ]
    if not have:
        return _rows.ZERO, 0
    if len(have) == 1:
        return have[0]
    for entry in have:
        if entry[0] == base:
            return entry
    averages.append(tuple(have))
    return _rows.AVERAGE, len(averages) - 1


def _named_source(
    token: str, source: TokenSource, vocabularies: Sequence[Vocabulary]
) -> tuple[int, int]:
    where = f"merge: tokenizer.tokens: {token!r}"
    for m, vocabulary in enumerate(vocabularies):
        if vocabulary.model != source.model:
            continue
        if source.token_id is not None:
            if source.token_id >= vocabulary.rows:
                raise ValueError(
                    f"{where}: {source.model} has {vocabulary.rows} rows; "
                    f"found token_id {source.token_id}"
                )
            return m, source.token_id
        wanted = token if source.token is None else source.token
        row = vocabulary.usable(wanted)
        if row is None:
            raise ValueError(f"{where}: {source.model} has no row for {wanted!r}")
        return m, row
    raise ValueError(f"{where}: {source.model} does not take part in the merge")
