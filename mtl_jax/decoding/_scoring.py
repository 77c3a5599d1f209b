"""How likely texts are: log-probabilities, ranked choices, perplexity."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import losses, models
from mtl_jax.decoding._models import hashable
from mtl_jax.models.layers.token_embeddings import head_kernel

NORMALIZATIONS = ("none", "tokens", "characters", "unconditional")
LogprobFn = Callable[..., chex.Array]
"""`fn(params, input_ids, labels, segment_ids) -> log p(labels) [B, L] float32`.

`input_ids`, `labels` and `segment_ids` are [B, L]; `log p(labels[b, i])` is that of the
token after `input_ids[b, i]`. One with an encoder has an attribute `start`, the token
in front of every text, and takes `source` and `source_segment_ids`, too.
"""


@dataclasses.dataclass(frozen=True)
class DecoderLogprobs:
    """A `LogprobFn` of a `models.Decoder`, the vocabulary never whole.

    Attributes:
      module: the decoder.
      chunk: positions whose logits exist at a time.
    """

    module: nn.Module
    chunk: int = 128

    def __post_init__(self):
        object.__setattr__(self, "module", hashable(self.module))

    def __call__(self, params, input_ids, labels, segment_ids=None):
        """See `LogprobFn`."""
        module = self.module
        hidden = module.apply({"params": params}, input_ids, segment_ids, head=False)
        kernel = head_kernel(params, module.tied)
        return -losses.token_cross_entropy(
            hidden, kernel, labels, chunk=self.chunk, softcap=module.logit_softcap
        )


@dataclasses.dataclass(frozen=True)
class LogitsLogprobs:
    """A `LogprobFn` of any function to logits.

    Attributes:
      logits_fn: `logits_fn(params, input_ids, segment_ids) -> [B, L, V]`, causal.
    """

    logits_fn: Callable[..., chex.Array]

    def __call__(self, params, input_ids, labels, segment_ids=None):
        """See `LogprobFn`."""
        logits = self.logits_fn(params, input_ids, segment_ids).astype(jnp.float32)
        return -losses.softmax_cross_entropy(logits, labels)


class SequenceScores(NamedTuple):
    """Log-probabilities of texts.

    Attributes:
      tokens: [B, L] float32, log p of token i given those before it; 0 where it is not
        asked for.
      total: [B] float32, the sum.
      count: [B] int32, how many tokens were scored.
    """

    tokens: chex.Array
    total: chex.Array
    count: chex.Array


def sequence_logprob(
    logprob_fn: LogprobFn,
    params: Any,
    input_ids: chex.Array,
    mask: chex.Array | None = None,
    *,
    segment_ids: chex.Array | None = None,
    source: chex.Array | None = None,
    source_segment_ids: chex.Array | None = None,
) -> SequenceScores:
    """`sum_i mask[i] log p(x[i] | x[<i])` of every row.

    The first token of a row or segment has nothing before it and is never scored;
    begin rows with a begin-of-text token to score all others. Given a source, every
    token is scored, as the decoder puts its start token in front.

    Args:
      logprob_fn: such as `DecoderLogprobs(module)` or `LogitsLogprobs(logits_fn)`.
      params: of the model.
      input_ids: [B, L] integer.
      mask: [B, L] bool, True = score this token; None = all but padding.
      segment_ids: [B, L] int32, 0 = padding; None = one segment per row.
      source: [B / G, S] integer, what the encoder of an encoder-decoder reads; row r
        of `input_ids` belongs to row r // G.
      source_segment_ids: [B / G, S] int32, 0 = padding; a token of `input_ids` reads
        the segment of its own number.

    Returns:
      `SequenceScores`. A token that the vocabulary lacks scores -inf.

    Raises:
      ValueError: if shapes differ, or an encoder has no source or a source no encoder.
    """
    if (source is None) == encodes(logprob_fn):
        raise ValueError(
            "sequence_logprob: a source belongs to models with an encoder, such as "
            "EncoderDecoderLogprobs"
        )
    if input_ids.ndim != 2:
        raise ValueError(
            f"sequence_logprob: input_ids must be [B, L], are {input_ids.shape}"
        )
    if segment_ids is None:
        segment_ids = jnp.ones(input_ids.shape, jnp.int32)
    scored = segment_ids != 0 if mask is None else mask
    for name, array in (("mask", scored), ("segment_ids", segment_ids)):
        if array.shape != input_ids.shape:
            raise ValueError(
                f"sequence_logprob: {name} is {array.shape}, input_ids "
                f"{input_ids.shape}"
            )
    scored = scored.astype(bool)
    if source is not None:
        shifted = models.shift_right(input_ids, segment_ids, start=logprob_fn.start)
        read = {"source": source, "source_segment_ids": source_segment_ids}
        found = logprob_fn(params, shifted, input_ids, segment_ids, **read)
        return _scores(found, scored & (segment_ids != 0))
    labels, follows = losses.next_tokens(input_ids, segment_ids)
    found = logprob_fn(params, input_ids, labels, segment_ids)
    behind = ((0, 0), (1, 0))
    follows = jnp.pad(follows[:, :-1] > 0, behind)
    return _scores(jnp.pad(found[:, :-1], behind), follows & scored)


def _scores(logprobs, scored):
    tokens = jnp.where(scored, logprobs, 0)
    count = jnp.sum(scored.astype(jnp.int32), axis=1)
    return SequenceScores(tokens, jnp.sum(tokens, axis=1), count)


def encodes(logprob_fn: Any) -> bool:
    """Whether a `LogprobFn` wants a source; it then says its `start` token."""
    return hasattr(logprob_fn, "start")


class Candidates(NamedTuple):
    """Answers to choose from; see `pad_candidates`.

    Attributes:
      ids: [N, M, C] int32, padded to the right.
      lengths: [N, M] int32, 0 = there is no such candidate.
    """

    ids: chex.Array
    lengths: chex.Array


def pad_candidates(candidates: Sequence[Sequence[Sequence[int]]]) -> Candidates:
    """N lists of token sequences as arrays; lists may differ in length.

    Raises:
      ValueError: for a list without candidates, or an empty candidate, by number.

    >>> pad_candidates([[[5], [6, 7]], [[8]]]).lengths.tolist()
    [[1, 2], [1, 0]]
    """
    for n, group in enumerate(candidates):
        if not len(group) or not all(len(c) for c in group):
            raise ValueError(
                f"pad_candidates: question {n} has no candidates or an empty one"
            )
    most = max((len(group) for group in candidates), default=1)
    longest = max((len(c) for group in candidates for c in group), default=1)
    ids = np.zeros((len(candidates), most, longest), np.int32)
    lengths = np.zeros((len(candidates), most), np.int32)
    for n, group in enumerate(candidates):
        for m, tokens in enumerate(group):
            ids[n, m, : len(tokens)] = tokens
            lengths[n, m] = len(tokens)
    return Candidates(ids, lengths)


class Ranking(NamedTuple):
    """Which candidate a model finds best.

    Attributes:
      best: [N] int32, the first of equals; -1 if a score of the row is NaN, as for
        an empty prompt.
      scores: [N, M] float32, normalised; -inf where there is no candidate.
      logprobs: [N, M] float32, sums of log p; -inf where there is no candidate.
    """

    best: chex.Array
    scores: chex.Array
    logprobs: chex.Array


def rank_classify(
    logprob_fn: LogprobFn,
    params: Any,
    prompts: chex.Array,
    prompt_lengths: chex.Array,
    candidates: Candidates,
    *,
    normalize: str = "none",
    characters: chex.Array | None = None,
    unconditional: chex.Array | None = None,
    rows: int | None = None,
) -> Ranking:
    """Chooses the candidate that a model finds most likely after the prompt.

      none:           log p(y | x)
      tokens:         log p(y | x) / tokens of y
      characters:     log p(y | x) / characters of y
      unconditional:  log p(y | x) - log p(y | u)

    Args:
      logprob_fn: see `sequence_logprob`. One with an encoder reads each x once.
      params: of the model.
      prompts: x, [N, P] int32, padded to the right.
      prompt_lengths: [N] int32, 1 or more.
      candidates: y, see `pad_candidates`.
      normalize: one of the four.
      characters: [N, M], for "characters"; 1 or more where there is a candidate.
      unconditional: u, [U] int32, the prompt without the question such as
        "Answer:", for "unconditional".
      rows: how many of the N * M texts are computed at a time; None = all.

    Returns:
      `Ranking`.

    Raises:
      ValueError: if shapes differ, or what a normalisation needs is missing.

    **Follows**: Brown et al. 2020, "Language Models are Few-Shot Learners", section
    2.4 ("unconditional" there is a ratio of the same probabilities); Sanh et al. 2022
    for rank classification ("none").
    """
    ids, lengths = (jnp.asarray(x, jnp.int32) for x in candidates)
    prompts, prompt_lengths = (
        jnp.asarray(x, jnp.int32) for x in (prompts, prompt_lengths)
    )
    _check_ranking(prompts, prompt_lengths, ids, lengths)
    needs = {"characters": characters, "unconditional": unconditional}
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"rank_classify: normalize must be one of {NORMALIZATIONS}, is "
            f"{normalize!r}"
        )
    for name, value in needs.items():
        if (normalize == name) != (value is not None):
            raise ValueError(
                f"rank_classify: {name} belongs to normalize={name!r}, which is "
                f"{normalize!r}"
            )
    score = functools.partial(_score_candidates, logprob_fn, params, rows=rows)
    logprobs = score(prompts, prompt_lengths, ids, lengths)
    # Nothing would predict the first token of a candidate.
    logprobs = jnp.where(prompt_lengths[:, None] < 1, jnp.nan, logprobs)
    there = lengths > 0
    scores = logprobs
    if normalize == "tokens":
        scores = logprobs / jnp.maximum(lengths, 1).astype(jnp.float32)
    elif characters is not None:
        if characters.shape != lengths.shape:
            raise ValueError(
                f"rank_classify: characters are {characters.shape}, candidates "
                f"{lengths.shape}"
            )
        scores = logprobs / jnp.maximum(characters, 1).astype(jnp.float32)
    elif unconditional is not None:
        free = jnp.asarray(unconditional, jnp.int32)[None]
        if free.ndim != 2 or not free.size:
            raise ValueError(
                f"rank_classify: unconditional is {free.shape[1:]}, wanted [U] with a "
                "token or more"
            )
        free = jnp.broadcast_to(free, (len(prompts), free.shape[1]))
        whole = jnp.full(len(prompts), free.shape[1], jnp.int32)
        scores = logprobs - score(free, whole, ids, lengths)
    scores = jnp.where(there, scores, -jnp.inf)
    broken = jnp.any(jnp.isnan(scores), axis=1)
    best = jnp.where(broken, -1, jnp.argmax(scores, axis=1)).astype(jnp.int32)
    return Ranking(best, scores, jnp.where(there, logprobs, -jnp.inf))


def _score_candidates(
    logprob_fn, params, prompts, prompt_lengths, ids, lengths, *, rows
):
    """[N, M] sums of log p; each prompt is joined to each of its candidates."""
    number, count, _ = ids.shape
    if encodes(logprob_fn):
        parts = prompts, prompt_lengths, ids, lengths
        groups = None if rows is None else max(1, rows // count)
        return _in_parts(
            functools.partial(_score_answers, logprob_fn, params), parts, groups
        )
    flat = (
        jnp.repeat(prompts, count, axis=0),
        jnp.repeat(prompt_lengths, count),
        ids.reshape(number * count, -1),
        lengths.reshape(-1),
    )
    score = functools.partial(_score_rows, logprob_fn, params)
    return _in_parts(score, flat, rows).reshape(number, count)


def _in_parts(score, arrays, rows):
    """`score` of so many rows at a time; None = all."""
    if rows is None:
        return score(*arrays)
    total = len(arrays[0])
    steps = -(-total // rows)

    def cut(x):
        pad = [(0, steps * rows - total)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(steps, rows, *x.shape[1:])

    out = jax.lax.map(lambda part: score(*part), jax.tree.map(cut, arrays))
    return out.reshape(-1, *out.shape[2:])[:total]


def _score_rows(logprob_fn, params, *parts):
    """[R] for R prompts and their candidates, each joined to one text."""
    (ids, segments), mask = _join(*parts)
    return sequence_logprob(logprob_fn, params, ids, mask, segment_ids=segments).total


def _score_answers(logprob_fn, params, prompts, prompt_lengths, ids, lengths):
    """[N, M] for N prompts, each encoded once, and their M candidates."""

    def segments(lengths, width):
        columns = jnp.arange(width, dtype=jnp.int32)
        return (columns[None] < lengths.reshape(-1, 1)).astype(jnp.int32)

    return sequence_logprob(
        logprob_fn,
        params,
        ids.reshape(-1, ids.shape[2]),
        segment_ids=segments(lengths, ids.shape[2]),
        source=prompts,
        source_segment_ids=segments(prompt_lengths, prompts.shape[1]),
    ).total.reshape(lengths.shape)


def _join(prompts, starts, tokens, lengths):
    """Rows prompt + candidate: ((ids, segments) [R, P + C], mask of the candidate)."""
    width = prompts.shape[1] + tokens.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)[None]
    inside = jnp.broadcast_to(column, (len(prompts), width))
    front = jnp.minimum(inside, prompts.shape[1] - 1)
    back = jnp.clip(inside - starts[:, None], 0, tokens.shape[1] - 1)
    ids = jnp.where(
        inside < starts[:, None],
        jnp.take_along_axis(prompts, front, axis=1),
        jnp.take_along_axis(tokens, back, axis=1),
    )
    end = (starts + lengths)[:, None]
    there = inside < end
    mask = there & (inside >= starts[:, None])
    return (jnp.where(there, ids, 0), there.astype(jnp.int32)), mask


def _check_ranking(prompts, prompt_lengths, ids, lengths):
    shapes = (prompts.shape, prompt_lengths.shape, ids.shape, lengths.shape)
    if not (
        prompts.ndim == 2
        and ids.ndim == 3
        and prompt_lengths.shape == prompts.shape[:1] == ids.shape[:1]
        and lengths.shape == ids.shape[:2]
    ):
        raise ValueError(
            "rank_classify: wanted prompts [N, P], prompt_lengths [N], candidates "
            f"[N, M, C] with lengths [N, M], found {', '.join(map(str, shapes))}"
        )
