"""Deterministic splits of raw rows: by hash of the content, so order never matters."""

import collections
import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from mtl_jax.data.task import SPLITS

_TRAIN, _VALIDATION = 0.8, 0.9
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Row:
    """One raw example.

    Attributes:
      value: what the builder stores: a text or an image.
      label: class index.
      key: identity of the content; rows with equal keys are duplicates.
      group: rows of one group stay in one split (default: the key). Used where
        rows are near-copies of each other or sentences of one document.
      split: fixes the split, where the source defines it.
    """

    value: Any
    label: int
    key: str
    group: str = ""
    split: str = ""


def text_key(text: str) -> str:
    """Identity of a text: its NFKC form, caseless, runs of spaces collapsed."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()


def text_row(text: str, label: int, group: str = "") -> Row:
    """A row whose key is `text_key(text)`; the stored text has its spaces collapsed."""
    return Row(_SPACE.sub(" ", text).strip(), label, text_key(text), group)


def _unit(key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "big") / 2**64


def split_of(group: str) -> str:
    """The split of a group: 80 % train, 10 % validation, 10 % test."""
    place = _unit(group, "split")
    return SPLITS[(place >= _TRAIN) + (place >= _VALIDATION)]


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """One row per key, the first; keys that carry two labels are dropped."""
    first: dict[str, Row] = {}
    conflicting = set()
    for row in rows:
        if first.setdefault(row.key, row).label != row.label:
            conflicting.add(row.key)
    return [row for key, row in first.items() if key not in conflicting]


def thin(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, taken from the classes in turn, in order of hash.

    Small classes stay whole and large ones are cut to a common size. With no limit
    all rows are kept. The result is in order of another hash, so that every stretch
    of it is a random sample.
    """
    rows = sorted(rows, key=lambda row: (_unit(row.key, "keep"), row.key))
    if limit is not None and len(rows) > limit:
        by_class = collections.defaultdict(list)
        for row in rows:
            by_class[row.label].append(row)
        turns = itertools.chain.from_iterable(
            itertools.zip_longest(*(by_class[label] for label in sorted(by_class)))
        )
        rows = list(itertools.islice(filter(None, turns), limit))
    return sorted(rows, key=lambda row: (_unit(row.key, "order"), row.key))


def assign(rows: Iterable[Row], limit: int | None = None) -> dict[str, list[Row]]:
    """Deduplicates, thins and splits.

    Args:
      rows: raw rows in any order of distinct content (among duplicates the first
        is kept, so their order decides which spelling is stored).
      limit: most rows over all splits together; None keeps all.

    Returns:
      `train`, `validation` and `test`, each in an order fixed by content.
    """
    table: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in thin(deduplicate(rows), limit):
        table[row.split or split_of(row.group or row.key)].append(row)
    return table
