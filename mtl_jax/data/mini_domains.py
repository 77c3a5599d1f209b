"""Strings with four questions: the answer depends on what is asked, not on the text.

A row is `tag letters > domain answer end`. Of each string of letters all four domains
have an answer; the tag names the domain that is asked for, the token after `>` the one
that is answered. Rows may be drawn whose tag means nothing: models that have read only
those know every domain, and not which one is asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DOMAINS = ("reverse", "sort", "shift", "facts")
LETTERS = 8
ASK = LETTERS + len(DOMAINS)
END = ASK + 1
VOCAB_SIZE = END + 1


class Strings(NamedTuple):
    """Rows to learn from.

    Attributes:
      input_ids: [B, L] int32, padded with `END`.
      weights: [B, L] float32, 1 for the tokens of the answer and the end.
    """

    input_ids: np.ndarray
    weights: np.ndarray


def answer(letters: Sequence[int], domain: str, facts: np.ndarray) -> list[int]:
    """What a domain makes of letters, its own token first.

    Args:
      letters: numbers from 0 to `LETTERS` - 1.
      domain: "reverse", "sort", "shift" (each letter's successor, cyclic) or "facts"
        (two letters looked up by the first two).
      facts: [LETTERS, LETTERS, 2], the table.

    Raises:
      ValueError: there is no such domain.
    """
    letters = [int(x) for x in letters]
    makers = {
        "reverse": lambda: letters[::-1],
        "sort": lambda: sorted(letters),
        "shift": lambda: [(x + 1) % LETTERS for x in letters],
        "facts": lambda: facts[letters[0], letters[1]].tolist(),
    }
    if domain not in makers:
        raise ValueError(f"answer: no domain {domain!r}, known: {', '.join(DOMAINS)}")
    return [LETTERS + DOMAINS.index(domain), *makers[domain]()]


def draw_facts(seed: int) -> np.ndarray:
    """A table [LETTERS, LETTERS, 2]."""
    return np.random.default_rng([seed, 7]).integers(0, LETTERS, (LETTERS, LETTERS, 2))


def prompts(
    rng: np.random.Generator, count: int, domain: str, longest: int
) -> list[list[int]]:
    """`tag letters >`, with 3 to `longest` letters."""
    tag = LETTERS + DOMAINS.index(domain)
    sizes = rng.integers(3, longest + 1, count)
    return [[tag, *rng.integers(0, LETTERS, n).tolist(), ASK] for n in sizes]


def draw(
    rng: np.random.Generator,
    size: int,
    facts: np.ndarray,
    *,
    longest: int = 5,
    domain: str | None = None,
    share: float = 0.5,
) -> Strings:
    """Rows to learn from.

    Args:
      rng: what to draw from.
      size: B.
      facts: from `draw_facts`.
      longest: most letters.
      domain: answers of rows with this tag belong to it; None = no tag means anything.
      share: of the rows that have this tag; the others have one of the others, and an
        answer of any domain.
    """
    length = 2 * longest + 4
    ids = np.full((size, length), END, np.int32)
    weights = np.zeros((size, length), np.float32)
    for row in range(size):
        own = domain is not None and rng.random() < share
        others = [d for d in DOMAINS if d != domain]
        tag = domain if own else others[rng.integers(len(others))]
        task = domain if own else DOMAINS[rng.integers(len(DOMAINS))]
        (prompt,) = prompts(rng, 1, tag, longest)
        found = [*prompt, *answer(prompt[1:-1], task, facts), END]
        ids[row, : len(found)] = found
        weights[row, len(prompt) : len(found)] = 1
    return Strings(ids, weights)
