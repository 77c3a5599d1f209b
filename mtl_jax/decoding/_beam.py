"""Beam search, the whole search in one compiled program."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding._generate import check_tokens
from mtl_jax.decoding._models import StepModel, recorded
from mtl_jax.decoding._prompts import (
    Sizes,
    Stop,
    StopTable,
    pad_prompts,
    plan,
    stop_table,
    stopped,
)
from mtl_jax.decoding.logits import Context, Processor

PENALTIES = ("mean", "gnmt")


class Beams(NamedTuple):
    """The K best texts of every prompt, best first.

    Attributes:
      tokens: [B, K, N] int32, with the stop sequence where there is one, then zeros.
      lengths: [B, K] int32; 0 where the search found fewer than K texts.
      stop_lengths: [B, K] int32, how many of the tokens are the stop sequence; 0 for
        a text that was cut at `max_new_tokens`.
      logprobs: [B, K] float32, sums of log p.
      scores: [B, K] float32, the sums over the length penalty; -inf where there is
        no text, NaN in rows whose logits were.
    """

    tokens: chex.Array
    lengths: chex.Array
    stop_lengths: chex.Array
    logprobs: chex.Array
    scores: chex.Array

    def rows(self, *, stop: bool = False) -> list[list[list[int]]]:
        """Token lists on the host, with or without the stop sequences."""
        lengths = np.asarray(self.lengths)
        if not stop:
            lengths = lengths - np.asarray(self.stop_lengths)
        return [
            [row[:n].tolist() for row, n in zip(beams, own, strict=True)]
            for beams, own in zip(np.asarray(self.tokens), lengths, strict=True)
        ]


class _Alive(NamedTuple):
    """Texts that go on: tokens [B, K, N] and sums [B, K], -inf = no text."""

    tokens: chex.Array
    logprobs: chex.Array


class _State(NamedTuple):
    alive: _Alive
    ended: Beams
    done: chex.Array
    broken: chex.Array
    step: chex.Array
    cache: Any


class _Fixed(NamedTuple):
    ids: chex.Array
    lengths: chex.Array
    process: Processor | None
    stop: StopTable
    alpha: chex.Array
    limit: chex.Array


class _Options(NamedTuple):
    sizes: Sizes
    beams: int
    candidates: int
    penalty: str
    early_stopping: bool


def beam_search(
    model: StepModel,
    params: Any,
    prompts: Sequence[Sequence[int]] | chex.Array,
    *,
    max_new_tokens: int,
    beams: int,
    lengths: chex.Array | None = None,
    stop: Stop = (),
    process: Processor | None = None,
    penalty: str = "mean",
    alpha: float = 1.0,
    early_stopping: bool = False,
) -> Beams:
    """The K best continuations that a search over K texts at a time finds.

      score(y) = log p(y) / penalty(|y|)
      penalty(n) = n^alpha  ("mean"),  ((5 + n) / 6)^alpha  ("gnmt")

    At every step the best continuations of the K texts are ranked by log p. Those
    among the first K that end, by a stop sequence or at `max_new_tokens`, compete by
    score for the K places of the result; the best K of the others go on. |y| counts
    generated tokens, the stop sequence included.

    A search is over when K texts have ended and none that goes on can still displace
    the worst of them, as log p only falls: best log p / penalty(max_new_tokens) <=
    worst score. What a model records of its steps is left out.

    Args:
      model: such as `from_decoder(module)`.
      params: of the model.
      prompts: token sequences, or one array [B, P].
      max_new_tokens: at most so many for each text.
      beams: K.
      lengths: [B] of an array of prompts; None = its rows are whole.
      stop: a token that ends a text, or tokens and token sequences.
      process: from `decoding.logits`, applied to log p, which is not normalised again;
        must leave it at 0 or below.
      penalty: "mean" or "gnmt".
      alpha: 0 or more; 0 ranks by log p, 1 with "mean" by the mean of log p.
      early_stopping: end a search as soon as K texts have ended.

    Returns:
      `Beams`.

    Raises:
      ValueError: as `generate`, or for options out of range.

    **Follows**: Wu et al. 2016, "Google's Neural Machine Translation System", eq. 14,
    without its coverage term.

    **Differs**: their pruning by beam size is left out. That only the first K
    candidates can end is as in fairseq and transformers.
    """
    if beams < 1:
        raise ValueError(f"beam_search: beams must be 1 or more, is {beams}")
    if penalty not in PENALTIES:
        raise ValueError(
            f"beam_search: penalty must be one of {PENALTIES}, is {penalty!r}"
        )
    if not 0 <= alpha < np.inf:
        raise ValueError(f"beam_search: alpha must be 0 or more, is {alpha}")
    ids, lengths = pad_prompts(prompts, lengths, limit=model.context)
    sizes = plan("beam_search", model, ids, lengths, max_new_tokens)
    table = stop_table(stop)
    check_tokens("beam_search", model, process, table)
    # Each text has at most one end per last token of a stop sequence.
    ends = len(np.unique(table.tokens[:, -1]))
    options = _Options(sizes, beams, max(2, 1 + ends) * beams, penalty, early_stopping)
    numbers = np.float32(alpha), np.int32(max_new_tokens)
    fixed = _Fixed(ids, lengths, process, table, *numbers)
    out = _search(model, params, fixed, options)
    return out._replace(tokens=out.tokens[:, :, :max_new_tokens])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _search(model, params, fixed: _Fixed, options: _Options) -> Beams:
    def goes_on(state):
        return (state.step < fixed.limit) & ~jnp.all(state.done)

    def body(state):
        last = jax.lax.dynamic_index_in_dim(
            state.alive.tokens, state.step - 1, axis=2, keepdims=False
        )
        found, cache = model.decode(params, last.reshape(-1), state.cache)
        state, rows = _step(fixed, options, recorded(found).logits, state)
        return state._replace(cache=model.reorder(cache, rows))

    rows, count = fixed.ids.shape[0], options.beams
    cache = model.init_cache(params, rows, options.sizes.slots)
    found, cache = model.prefill(params, fixed.ids, fixed.lengths, cache)
    logits = recorded(found).logits
    state, order = _step(
        fixed, options, jnp.repeat(logits, count, axis=0), _begin(rows, options)
    )
    cache = model.reorder(cache, order // count)
    state = jax.lax.while_loop(goes_on, body, state._replace(cache=cache))
    poison = jnp.where(state.broken, jnp.nan, 0.0)[:, None]
    return state.ended._replace(scores=state.ended.scores + poison)


def _begin(rows, options):
    """One text without tokens per prompt."""
    count = options.beams
    tokens = jnp.zeros((rows, count, options.sizes.new), jnp.int32)
    nothing = jnp.full((rows, count), -jnp.inf)
    zeros = jnp.zeros((rows, count), jnp.int32)
    no = jnp.zeros(rows, bool)
    return _State(
        alive=_Alive(tokens, nothing.at[:, 0].set(0)),
        ended=Beams(tokens, zeros, zeros, nothing, nothing),
        done=no,
        broken=no,
        step=jnp.zeros((), jnp.int32),
        cache=None,
    )


def _step(fixed, options, logits, state):
    """Extends all texts by a token; the new state, and whose cache each text takes."""
    rows, count, _ = state.alive.tokens.shape
    logprobs, broken = _logprobs(fixed, logits, state.alive.tokens, state.step)
    vocab = logprobs.shape[-1]
    total = logprobs + state.alive.logprobs[:, :, None]
    size = min(options.candidates, count * vocab)
    total, index = jax.lax.top_k(total.reshape(rows, -1), size)
    parent, token = index // vocab, index % vocab
    tokens = jnp.take_along_axis(state.alive.tokens, parent[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, token[:, :, None], state.step, axis=2
    )
    flat = tokens.reshape(rows * size, -1)
    stops = stopped(fixed.stop, flat, state.step).reshape(rows, size)
    step = state.step + 1
    ends = (stops > 0) | (step >= fixed.limit)

    first = jnp.arange(size, dtype=jnp.int32) < count
    counts = ends & first[None] & (total > -jnp.inf) & ~state.done[:, None]
    score = jnp.where(counts, total / _penalty(fixed, options, step), -jnp.inf)
    fresh = Beams(
        tokens, jnp.where(counts, step, 0), jnp.where(counts, stops, 0), total, score
    )
    ended = _best(state.ended, fresh, count)

    onward, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), min(count, size))
    alive = _Alive(jnp.take_along_axis(tokens, chosen[:, :, None], axis=1), onward)
    parent = jnp.take_along_axis(parent, chosen, axis=1)
    alive, parent = _fill(alive, parent, count)
    # Sums of log p only fall, so this is the best that can still come.
    hope = onward[:, 0] / _penalty(fixed, options, fixed.limit)
    worst = ended.scores[:, -1]
    done = (worst >= hope) & (worst > -jnp.inf)
    if options.early_stopping:
        done = worst > -jnp.inf
    done = done | state.done | (onward[:, 0] == -jnp.inf)
    base = jnp.arange(rows, dtype=jnp.int32)[:, None] * count
    state = _State(alive, ended, done, state.broken | broken, step, state.cache)
    return state, (base + parent).reshape(-1)


def _logprobs(fixed, logits, tokens, step):
    """Log p of all next tokens [B, K, V], and which rows have logits that are not."""
    rows, count, size = tokens.shape
    logits = logits.astype(jnp.float32)
    found = jax.nn.log_softmax(logits, axis=-1)
    if fixed.process is not None:
        context = Context(
            jnp.repeat(fixed.ids, count, axis=0),
            jnp.repeat(fixed.lengths, count, axis=0),
            tokens.reshape(rows * count, size),
            step,
        )
        found = fixed.process(found, context)
    found = found.reshape(rows, count, -1)
    wrong = jnp.isnan(found)
    return jnp.where(wrong, -jnp.inf, found), jnp.any(wrong, axis=(1, 2))


def _penalty(fixed, options, length):
    length = jnp.asarray(length, jnp.int32).astype(jnp.float32)
    if options.penalty == "gnmt":
        length = (5 + length) / 6
    return length**fixed.alpha


def _best(old, new, count):
    """The texts with the best scores of two lots; the older first among equals."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    _, chosen = jax.lax.top_k(both.scores, count)
    return jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, chosen.reshape(chosen.shape + (1,) * (x.ndim - 2)), axis=1
        ),
        both,
    )


def _fill(alive, parent, count):
    """Places for texts that a small vocabulary does not have."""
    missing = count - parent.shape[1]
    pad = ((0, 0), (0, missing))
    return _Alive(
        jnp.pad(alive.tokens, (*pad, (0, 0))),
        jnp.pad(alive.logprobs, pad, constant_values=-jnp.inf),
    ), jnp.pad(parent, pad)
