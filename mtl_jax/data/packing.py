"""Documents packed into rows of one length, as a random-access source.

Which pieces share a row is planned from the lengths alone, before any token is read,
so rows can be shuffled, sharded and resumed by their number, as any source.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

METHODS = ("first_fit_decreasing", "next_fit")
LONG = ("split", "cut", "error")


class Piece(NamedTuple):
    """Tokens `start ... stop - 1` of a document."""

    document: int
    start: int
    stop: int


def pack(
    lengths: Sequence[int],
    row_length: int,
    *,
    method: str = "first_fit_decreasing",
    window: int = 1024,
    long: str = "split",
    max_segments: int | None = None,
) -> list[tuple[Piece, ...]]:
    """Decides which pieces of documents share a row.

    "first_fit_decreasing" takes `window` documents at a time and puts each, longest
    first, into the first row of the window that has room. "next_fit" takes one after
    the other and opens a row when the last has no room: it keeps the order, and needs
    no window. Ties go to the earlier document; rows come in the order they were opened.

    Args:
      lengths: number of tokens of each document.
      row_length: L.
      method: see above.
      window: documents that are sorted together.
      long: of documents of more than L tokens: "split" makes pieces of L, the rest
        last; "cut" keeps the first L tokens; "error" refuses.
      max_segments: most pieces in a row; None = as many as fit.

    Returns:
      The pieces of each row, in the order of the documents.

    Raises:
      ValueError: for an empty document, one that is too long where that is an error,
        or an option that does not exist.

    >>> [[piece.document for piece in row] for row in pack([5, 2, 3, 6], 8)]
    [[1, 3], [0, 2]]
    >>> [len(row) for row in pack([5, 2, 3, 6], 8, method="next_fit")]
    [2, 1, 1]
    """
    _check(row_length, method, window, long, max_segments)
    limit = row_length if max_segments is None else max_segments
    step = window if method == "first_fit_decreasing" else max(len(lengths), 1)
    fit = _first_fit if method == "first_fit_decreasing" else _next_fit
    rows = []
    for start in range(0, len(lengths), step):
        pieces = [
            piece
            for document in range(start, min(start + step, len(lengths)))
            for piece in _pieces(document, int(lengths[document]), row_length, long)
        ]
        rows += fit(pieces, row_length, limit)
    return [tuple(sorted(row)) for row in rows]


def _pieces(document, length, row_length, long) -> Iterable[Piece]:
    if length < 1:
        raise ValueError(f"pack: document {document} is empty")
    if length > row_length and long == "error":
        raise ValueError(
            f"pack: document {document} has {length} tokens, a row {row_length}"
        )
    end = min(length, row_length) if long == "cut" else length
    for start in range(0, end, row_length):
        yield Piece(document, start, min(start + row_length, end))


def _first_fit(pieces, row_length, limit):
    sizes = np.array([piece.stop - piece.start for piece in pieces])
    rows: list[list[Piece]] = []
    room = np.empty(len(pieces), np.int64)  # Of the rows that are open.
    for i in np.argsort(-sizes, kind="stable"):
        fits = room[: len(rows)] >= sizes[i]
        place = int(np.argmax(fits)) if fits.any() else len(rows)
        if place == len(rows):
            rows.append([])
            room[place] = row_length
        rows[place].append(pieces[i])
        room[place] = 0 if len(rows[place]) == limit else room[place] - sizes[i]
    return rows


def _next_fit(pieces, row_length, limit):
    rows: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.stop - piece.start
        if size > room or len(rows[-1]) == limit:
            rows.append([])
            room = row_length
        rows[-1].append(piece)
        room -= size
    return rows


class Packed(Sequence):
    """Rows of packed documents.

    Row n is a dict of arrays [L]: `input_ids` int32; `segment_ids` int32, 1, 2, ... for
    the pieces in it and 0 for padding; `positions` int32, from 0 in each segment; and
    `weights` float32, of each token as something to predict, 0 for padding. The first
    token of a segment is predicted by none, whatever its weight.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        row_length: int,
        *,
        method: str = "first_fit_decreasing",
        window: int = 1024,
        long: str = "split",
        max_segments: int | None = None,
        padding: int = 0,
    ):
        """Plans the rows; reads every document once for its length.

        Args:
          documents: random access; each the token numbers [n], or a dict with
            `input_ids` [n] and maybe `weights` [n].
          row_length: L.
          method: see `pack`.
          window: see `pack`.
          long: see `pack`.
          max_segments: see `pack`.
          padding: token number in places that hold no document.

        Raises:
          ValueError: as `pack`, or weights of another length than the tokens.
        """
        self._documents = documents
        self._length = row_length
        self._padding = padding
        lengths = [len(_tokens(documents[i])[0]) for i in range(len(documents))]
        self._rows = pack(
            lengths,
            row_length,
            method=method,
            window=window,
            long=long,
            max_segments=max_segments,
        )
        self._about = f"{method}, window={window}, long={long}, max={max_segments}"

    @property
    def rows(self) -> list[tuple[Piece, ...]]:
        """What `pack` decided."""
        return self._rows

    @property
    def max_segments(self) -> int:
        """The most segments that a row has."""
        return max((len(row) for row in self._rows), default=0)

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        used = sum(p.stop - p.start for row in self._rows for p in row)
        return used / max(len(self._rows) * self._length, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        out = {
            "input_ids": np.full(self._length, self._padding, np.int32),
            "segment_ids": np.zeros(self._length, np.int32),
            "positions": np.zeros(self._length, np.int32),
            "weights": np.zeros(self._length, np.float32),
        }
        at = 0
        for number, piece in enumerate(self._rows[index], 1):
            tokens, weights = _tokens(self._documents[piece.document])
            size = piece.stop - piece.start
            place, source = slice(at, at + size), slice(piece.start, piece.stop)
            out["input_ids"][place] = tokens[source]
            out["segment_ids"][place] = number
            out["positions"][place] = np.arange(size)
            out["weights"][place] = 1.0 if weights is None else weights[source]
            at += size
        return out

    def __repr__(self) -> str:
        return f"Packed({self._documents!r}, {self._length}, {self._about})"


def _tokens(document):
    """(token numbers, weights or None)."""
    if not isinstance(document, Mapping):
        return document, None
    tokens, weights = document["input_ids"], document.get("weights")
    if weights is not None and len(weights) != len(tokens):
        raise ValueError(
            f"Packed: {len(weights)} weights for a document of {len(tokens)} tokens"
        )
    return tokens, weights


def _check(row_length, method, window, long, max_segments) -> None:
    for name, value, known in (("method", method, METHODS), ("long", long, LONG)):
        if value not in known:
            raise ValueError(f"pack: {name} is {value!r}, wanted one of {known}")
    counts = {"row_length": row_length, "window": window, "max_segments": max_segments}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"pack: {name} wants 1 or more, is {value}")
