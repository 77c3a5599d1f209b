"""Texts by domain, for language models: those of the text tasks, and two invented."""

from collections.abc import Callable, Sequence

import numpy as np

from mtl_jax.data import sources
from mtl_jax.data.text_tasks import TEXT_TASKS

_SIZES = {"train": 256, "validation": 64, "test": 64}


def _counting(rng: np.random.Generator) -> str:
    first, step = rng.integers(1, 30), rng.integers(1, 4)
    return " ".join(str(first + step * i) for i in range(rng.integers(4, 9)))


def _letters(rng: np.random.Generator) -> str:
    first = rng.integers(0, 20)
    run = [chr(97 + (first + i) % 26) for i in range(rng.integers(4, 12))]
    return "-".join(run)


INVENTED: dict[str, Callable[[np.random.Generator], str]] = {
    "counting": _counting,
    "letters": _letters,
}
"""Two languages that a tiny model can learn: progressions, and runs of the alphabet."""


def texts(name: str, split: str, *, limit: int | None = None) -> Sequence[str]:
    """The texts of a domain, without their labels.

    Args:
      name: a text task, or one of `INVENTED`.
      split: "train", "validation" or "test".
      limit: most texts, the first ones; None = all.

    Returns:
      A list of strings.

    Raises:
      ValueError: no such domain or split.
      wheels.FetchError: the package that holds the texts is not to be had.

    >>> texts("letters", "test", limit=1)
    ['n-o-p-q']
    """
    known = (*TEXT_TASKS, *INVENTED)
    if name not in known:
        raise ValueError(f"texts: no domain {name!r}, known: {', '.join(known)}")
    if name in INVENTED:
        if split not in _SIZES:
            raise ValueError(f"texts: no split {split!r}, known: {', '.join(_SIZES)}")
        rng = np.random.default_rng([list(_SIZES).index(split), len(name)])
        return [INVENTED[name](rng) for _ in range(limit or _SIZES[split])]
    source = sources.load_source(name, split)
    count = len(source) if limit is None else min(limit, len(source))
    return [_decoded(source[i]["text"]) for i in range(count)]


def _decoded(text) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)
