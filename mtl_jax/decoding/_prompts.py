"""Prompts as arrays of few shapes, and the sequences that end a text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding._models import StepModel

_SMALLEST = 16


def bucket(size: int, limit: int | None = None) -> int:
    """The smallest power of two that holds `size`, 16 or more, `limit` or less.

    >>> bucket(5), bucket(17), bucket(100, limit=120)
    (16, 32, 120)
    """
    full = max(_SMALLEST, 1 << max(size - 1, 0).bit_length())
    return full if limit is None else min(full, max(limit, size))


def pad_prompts(
    prompts: Sequence[Sequence[int]] | chex.Array,
    lengths: chex.Array | None = None,
    *,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as one array, padded to the right with zeros up to a `bucket`.

    Args:
      prompts: token sequences, or one array [B, P].
      lengths: [B] of an array; None = its rows are whole.
      limit: of the width, such as the context of the model.

    Returns:
      (ids [B, P'] int32, lengths [B] int32).

    Raises:
      ValueError: without prompts, for an empty one, by number, or lengths that do not
        fit.

    >>> ids, lengths = pad_prompts([[5, 6, 7], [8]])
    >>> ids.shape, lengths.tolist()
    ((2, 16), [3, 1])
    """
    rows = _rows(prompts, lengths)
    if not rows:
        raise ValueError("pad_prompts: there are no prompts")
    for number, row in enumerate(rows):
        if not row.size:
            raise ValueError(f"pad_prompts: prompt {number} is empty")
        if row.min() < 0:
            raise ValueError(f"pad_prompts: prompt {number} has token {row.min()}")
    out = np.zeros((len(rows), bucket(max(map(len, rows)), limit)), np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)


def _rows(prompts, lengths):
    if not hasattr(prompts, "shape"):
        if lengths is not None:
            raise ValueError("pad_prompts: lengths belong to an array of prompts")
        return [np.asarray(row, np.int32).reshape(-1) for row in prompts]
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or not np.issubdtype(prompts.dtype, np.integer):
        raise ValueError(
            f"pad_prompts: wanted integers [B, P], found {prompts.dtype} "
            f"{prompts.shape}"
        )
    if lengths is None:
        return list(prompts.astype(np.int32))
    lengths = np.asarray(lengths)
    if lengths.shape != prompts.shape[:1] or (lengths > prompts.shape[1]).any():
        raise ValueError(
            f"pad_prompts: lengths {lengths.tolist()} do not fit prompts "
            f"{prompts.shape}"
        )
    return [row[:n] for row, n in zip(prompts.astype(np.int32), lengths, strict=True)]


class Sizes(NamedTuple):
    """Static sizes of a decoding: columns that are generated, slots of the cache."""

    new: int
    slots: int


def plan(
    name: str, model: StepModel, ids: Any, lengths: Any, max_new_tokens: int
) -> Sizes:
    """Sizes that hold prompts and answers; refuses what the model cannot hold.

    Raises:
      ValueError: if nothing is to be generated, a token is not in the vocabulary, or
        a prompt leaves too little room in the context.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"{name}: max_new_tokens must be 1 or more, is {max_new_tokens}"
        )
    if model.vocab_size is not None and ids.max() >= model.vocab_size:
        number = int(np.argmax(ids.max(axis=1)))
        raise ValueError(
            f"{name}: prompt {number} has token {ids.max()}, the vocabulary "
            f"{model.vocab_size} tokens"
        )
    longest = int(np.argmax(lengths))
    if getattr(model, "encodes", False):
        return _plan_apart(name, model, longest, lengths[longest], max_new_tokens)
    if model.context is not None and lengths[longest] + max_new_tokens > model.context:
        raise ValueError(
            f"{name}: prompt {longest} has {lengths[longest]} tokens, which leaves no "
            f"room for {max_new_tokens} more in the context of {model.context}"
        )
    new = bucket(max_new_tokens, model.context)
    slots = ids.shape[1] + new
    return Sizes(new, slots if model.context is None else min(slots, model.context))


def _plan_apart(name, model, number, length, max_new_tokens):
    """Sizes where prompts and answers have room of their own each."""
    if model.context is not None and max(length, max_new_tokens) > model.context:
        raise ValueError(
            f"{name}: prompt {number} has {length} tokens and {max_new_tokens} are to "
            f"be generated, the context holds {model.context} of either"
        )
    new = bucket(max_new_tokens, model.context)
    return Sizes(new, new)


Stop = int | Sequence[int | Sequence[int]]


class StopTable(NamedTuple):
    """Token sequences that end a text.

    Attributes:
      tokens: [M, K] int32, aligned to the right; -1 where a sequence is shorter.
      lengths: [M] int32.
    """

    tokens: chex.Array
    lengths: chex.Array


def stop_table(stop: Stop) -> StopTable:
    """Makes a table of a token, or of tokens and token sequences.

    Raises:
      ValueError: for an empty sequence or a negative number.
    """
    items = [stop] if isinstance(stop, int | np.integer) else list(stop)
    rows = [np.atleast_1d(np.asarray(item, np.int32)) for item in items]
    if any(not row.size or row.min() < 0 for row in rows):
        raise ValueError(
            f"stop: wanted token numbers and sequences of them, found {stop}"
        )
    width = max(map(len, rows), default=1)
    table = np.full((len(rows), width), -1, np.int32)
    for target, row in zip(table, rows, strict=True):
        target[width - len(row) :] = row
    return StopTable(table, np.array([len(row) for row in rows], np.int32))


def stopped(stop: StopTable, generated: chex.Array, step: chex.Array) -> chex.Array:
    """Length of the longest stop sequence that column `step` completes, 0 = none.

    Args:
      stop: M sequences of up to K tokens.
      generated: [B, N] int32, columns up to `step` filled.
      step: int32 scalar.

    Returns:
      [B] int32.
    """
    width = stop.tokens.shape[1]
    padded = jnp.pad(generated, ((0, 0), (width, 0)), constant_values=-2)
    first = jnp.asarray(step, jnp.int32) + 1
    columns = first + jnp.arange(width, dtype=jnp.int32)
    window = jnp.take(padded, columns, axis=1)[:, None]
    table = jnp.asarray(stop.tokens)[None]
    hit = jnp.all((window == table) | (table < 0), axis=2)
    lengths = jnp.where(hit, jnp.asarray(stop.lengths)[None], 0)
    return jnp.max(lengths, axis=1, initial=0)
