"""Invented documents with a topic and a meaning, for embeddings that cannot serve both.

A document is a bag of words: some of its topic, some that say its meaning in one of
several wordings, some of neither. Retrieval asks for documents of the topic of a query,
whatever they mean; similarity asks whether two documents mean the same, whatever their
topic and their wording. The two want opposite things of one vector.
"""

from typing import NamedTuple

import numpy as np

TOPICS, WORDS = 24, 10
MEANINGS, WORDINGS, SAID = 24, 4, 6
FILLERS = 60
PAD = 0
VOCAB_SIZE = 1 + TOPICS * WORDS + MEANINGS * WORDINGS * SAID + FILLERS
LENGTH = 12


class Pairs(NamedTuple):
    """Pairs of texts that belong together.

    Attributes:
      first: [N, LENGTH] int32.
      second: [N, LENGTH] int32.
      label: [N] int32; pairs with the same label are not each other's negatives.
    """

    first: np.ndarray
    second: np.ndarray
    label: np.ndarray


def write(
    rng: np.random.Generator,
    topic: np.ndarray,
    meaning: np.ndarray,
    wording: np.ndarray,
) -> np.ndarray:
    """Documents with given topics, meanings and wordings, each [N] -> [N, LENGTH]."""
    count = len(topic)
    about = 1 + topic[:, None] * WORDS + rng.integers(0, WORDS, (count, 4))
    start = 1 + TOPICS * WORDS
    said = (meaning * WORDINGS + wording)[:, None] * SAID
    said = start + said + rng.integers(0, SAID, (count, 4))
    start += MEANINGS * WORDINGS * SAID
    other = start + rng.integers(0, FILLERS, (count, LENGTH - 8))
    words = np.concatenate([about, said, other], 1)
    return rng.permuted(words, axis=1).astype(np.int32)


def _traits(rng, count):
    """Random topic, meaning and wording of each of `count` documents."""
    sizes = (TOPICS, MEANINGS, WORDINGS)
    return tuple(rng.integers(0, size, count) for size in sizes)


def crops(rng: np.random.Generator, count: int) -> Pairs:
    """Two documents of one topic, meaning and wording: what to begin with."""
    traits = _traits(rng, count)
    topic, meaning, _ = traits
    label = (topic * MEANINGS + meaning).astype(np.int32)
    return Pairs(write(rng, *traits), write(rng, *traits), label)


def retrieval(rng: np.random.Generator, count: int) -> Pairs:
    """Query and document of one topic; what they mean is drawn apart."""
    topic, *first = _traits(rng, count)
    _, *second = _traits(rng, count)
    label = topic.astype(np.int32)
    return Pairs(write(rng, topic, *first), write(rng, topic, *second), label)


def similarity(rng: np.random.Generator, count: int) -> Pairs:
    """Two wordings of one meaning; their topics are drawn apart."""
    topic, meaning, wording = _traits(rng, count)
    other, _, step = _traits(rng, count)
    again = (wording + 1 + step % (WORDINGS - 1)) % WORDINGS
    first, second = (
        write(rng, topic, meaning, wording),
        write(rng, other, meaning, again),
    )
    return Pairs(first, second, meaning.astype(np.int32))


def judged(rng: np.random.Generator, count: int) -> tuple[Pairs, np.ndarray]:
    """Pairs with a similarity of 1 or 0 each: half of them mean the same."""
    pairs = similarity(rng, count)
    alike = rng.random(count) < 0.5
    topic, meaning, wording = _traits(rng, count)
    meaning = np.where(meaning == pairs.label, (meaning + 1) % MEANINGS, meaning)
    others = write(rng, topic, meaning, wording)
    second = np.where(alike[:, None], pairs.second, others)
    return pairs._replace(second=second), alike.astype(np.float32)
