"""Perplexity of documents, through a sliding window."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax.decoding._scoring import LogprobFn, sequence_logprob


class Perplexity(NamedTuple):
    """How well a model predicts documents.

    Attributes:
      value: `exp(nll / tokens)`.
      nll: `-sum log p` in nats, summed in float64.
      tokens: how many were scored.
    """

    value: float
    nll: float
    tokens: int


def perplexity(
    logprob_fn: LogprobFn,
    params: Any,
    documents: Sequence[Sequence[int]],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """`exp(-mean log p)` over the tokens of documents, through a sliding window.

    Windows of a document begin `stride` tokens apart. Every token but the first of
    its document is scored once, in the first window that holds it with a token
    before it: with `window - stride` tokens of context or more, but for the first
    window.

    Args:
      logprob_fn: see `sequence_logprob`; hashable, as it is compiled in.
      params: of the model.
      documents: token sequences.
      window: tokens that the model sees at a time, 2 or more.
      stride: 1 ... `window - 1`; None = `window - 1`, so that windows share a token.
      batch_size: windows at a time; one program serves all.

    Returns:
      `Perplexity`.

    Raises:
      ValueError: for sizes out of range, or documents without a token to score.
    """
    stride = window - 1 if stride is None else stride
    if window < 2 or not 1 <= stride < window or batch_size < 1:
        raise ValueError(
            "perplexity: wanted window >= 2, 1 <= stride < window and batch_size >= 1, "
            f"found {window}, {stride} and {batch_size}"
        )
    rows = [row for d in documents for row in _windows(d, window, stride)]
    if not rows:
        raise ValueError("perplexity: no document has two tokens")
    nll = tokens = 0
    for at in range(0, len(rows), batch_size):
        ids, segments, mask = _stacked(rows[at : at + batch_size], batch_size, window)
        found = _score_batch(logprob_fn, params, ids, segments, mask)
        nll -= float(np.sum(np.asarray(found.tokens, np.float64)))
        tokens += int(np.sum(np.asarray(found.count)))
    with np.errstate(over="ignore"):
        return Perplexity(float(np.exp(np.float64(nll / tokens))), nll, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(logprob_fn, params, ids, segments, mask):
    return sequence_logprob(logprob_fn, params, ids, mask, segment_ids=segments)


def _windows(document, window, stride):
    """(tokens, first that is scored) of every window."""
    document = np.asarray(document, np.int32)
    done = 1
    for begin in range(0, len(document), stride):
        if done >= len(document):
            return
        end = min(begin + window, len(document))
        yield document[begin:end], done - begin
        done = end


def _stacked(rows, batch_size, window):
    ids = np.zeros((batch_size, window), np.int32)
    segments = np.zeros((batch_size, window), np.int32)
    mask = np.zeros((batch_size, window), bool)
    for b, (tokens, first) in enumerate(rows):
        ids[b, : len(tokens)] = tokens
        segments[b, : len(tokens)] = 1
        mask[b, first : len(tokens)] = True
    return ids, segments, mask
