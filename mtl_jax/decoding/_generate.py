"""Greedy and sampled text, the whole loop in one compiled program."""

import enum
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding._models import Recorded, StepModel, recorded
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


class Reason(enum.IntEnum):
    """Why a row ended."""

    LENGTH = 0
    """As many tokens as were asked for."""
    STOP = 1
    """A stop sequence."""
    NO_TOKEN = 2
    """The processors excluded every token."""
    NOT_FINITE = 3
    """NaN or infinite logits."""


class Generation(NamedTuple):
    """What was generated, row by row.

    Attributes:
      tokens: [B, N] int32, with the stop sequence where there is one, then zeros.
      lengths: [B] int32, tokens of each row, the stop sequence included.
      stop_lengths: [B] int32, how many of these are the stop sequence.
      reasons: [B] int32, values of `Reason`.
      logprobs: [B, N] float32, log p of each token under the model as it is, before
        any processor; 0 beyond the length.
      records: tree of arrays [N, B, ...], what the model recorded when it chose each
        token, 0 beyond the length; None for models that record nothing.
    """

    tokens: chex.Array
    lengths: chex.Array
    stop_lengths: chex.Array
    reasons: chex.Array
    logprobs: chex.Array
    records: Any = None

    def first(self, columns: int) -> "Generation":
        """The same, of `columns` tokens at most."""
        return self._replace(
            tokens=self.tokens[:, :columns],
            logprobs=self.logprobs[:, :columns],
            records=jax.tree.map(lambda x: x[:columns], self.records),
        )

    def rows(self, *, stop: bool = False) -> list[list[int]]:
        """Token lists on the host, with or without the stop sequences."""
        lengths = np.asarray(self.lengths)
        if not stop:
            lengths = lengths - np.asarray(self.stop_lengths)
        tokens = np.asarray(self.tokens)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class _State(NamedTuple):
    """Of the loop; what is generated so far, and the tokens to be read next."""

    out: Generation
    active: chex.Array
    token: chex.Array
    step: chex.Array
    cache: Any


class _Fixed(NamedTuple):
    """What the loop only reads."""

    ids: chex.Array
    lengths: chex.Array
    keys: chex.Array | None
    process: Processor | None
    stop: StopTable


def generate(
    model: StepModel,
    params: Any,
    prompts: Sequence[Sequence[int]] | chex.Array,
    *,
    max_new_tokens: int,
    lengths: chex.Array | None = None,
    key: chex.PRNGKey | None = None,
    process: Processor | None = None,
    stop: Stop = (),
) -> Generation:
    """Continues prompts, token by token.

      token = argmax_v (process(logits)[v] + noise[v]),  noise Gumbel or none

    Prompts and answers are padded to `bucket`s: one program serves all prompts of a
    bucket, with any lengths, seeds and values of the processors. A row's result does
    not depend on the rows beside it.

    Args:
      model: such as `from_decoder(module)`.
      params: of the model.
      prompts: token sequences, or one array [B, P].
      max_new_tokens: at most so many for each row.
      lengths: [B] of an array of prompts; None = its rows are whole.
      key: None = greedy, the first of equals. A typed key, of which row b takes
        `fold_in(key, b)`, or one key per row [B]; step t folds in t.
      process: from `decoding.logits`.
      stop: a token that ends a row, or tokens and token sequences; only generated
        tokens count.

    Returns:
      `Generation`.

    Raises:
      ValueError: for an empty prompt, a token that the vocabulary lacks, or a prompt
        that leaves too little room in the context.
    """
    fixed, sizes = _prepare(
        "generate", model, prompts, max_new_tokens, lengths, key, process, stop
    )
    out = _generate(model, params, fixed, np.int32(max_new_tokens), sizes)
    return out.first(max_new_tokens)


def stream(
    model: StepModel,
    params: Any,
    prompts: Sequence[Sequence[int]] | chex.Array,
    *,
    max_new_tokens: int,
    lengths: chex.Array | None = None,
    key: chex.PRNGKey | None = None,
    process: Processor | None = None,
    stop: Stop = (),
) -> Iterator[Generation]:
    """Like `generate`, but hands over what there is after every token.

    The loop is on the host: end it early to stop.

    Args:
      model: see `generate`, as for the rest.
      params: of the model.
      prompts: token sequences, or one array.
      max_new_tokens: at most so many for each row.
      lengths: of an array of prompts.
      key: None = greedy.
      process: from `decoding.logits`.
      stop: what ends a row.

    Yields:
      `Generation` of t columns after token t, in NumPy. Rows that still go on have
      `Reason.LENGTH`; the last one yielded is what `generate` returns, but for
      columns in which no row has a token.

    Raises:
      ValueError: as `generate`.
    """
    fixed, sizes = _prepare(
        "stream", model, prompts, max_new_tokens, lengths, key, process, stop
    )
    return _stream(model, params, fixed, sizes, max_new_tokens)


def _stream(model, params, fixed, sizes, limit):
    state = _first(model, params, fixed, sizes)
    for step in range(1, limit + 1):
        out, active = jax.device_get((state.out, state.active))
        yield out.first(step)
        if step == limit or not active.any():
            return
        rest = state._replace(cache=None)
        state = _next(model, params, fixed, rest, state.cache)


def _prepare(name, model, prompts, max_new_tokens, lengths, key, process, stop):
    ids, lengths = pad_prompts(prompts, lengths, limit=model.context)
    sizes = plan(name, model, ids, lengths, max_new_tokens)
    table = stop_table(stop)
    check_tokens(name, model, process, table)
    keys = None if key is None else row_keys(name, key, len(ids))
    return _Fixed(ids, lengths, keys, process, table), sizes


def check_tokens(
    name: str, model: StepModel, process: Processor | None, stop: StopTable
) -> None:
    """Refuses processors that are none, and tokens that the vocabulary lacks."""
    if process is not None and not isinstance(process, Processor):
        raise ValueError(
            f"{name}: process is a {type(process).__name__}, wanted a "
            "logits.Processor (wrap a function in it)"
        )
    if model.vocab_size is None:
        return
    largest = max(
        process.largest_token() if process is not None else -1,
        int(np.max(stop.tokens, initial=-1)),
    )
    if largest >= model.vocab_size:
        raise ValueError(
            f"{name}: a processor or stop has token {largest}, the vocabulary "
            f"{model.vocab_size} tokens"
        )


def row_keys(name: str, key: chex.PRNGKey, rows: int) -> chex.Array:
    """One typed key per row [B]."""
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(f"{name}: key must be a typed key, such as jax.random.key(0)")
    if key.ndim == 0:
        numbers = jnp.arange(rows, dtype=jnp.uint32)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    if key.shape != (rows,):
        raise ValueError(f"{name}: {rows} prompts, but keys {key.shape}")
    return key


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(model, params, fixed, limit, sizes) -> Generation:
    def goes_on(state):
        return (state.step < limit) & jnp.any(state.active)

    def body(state):
        logits, cache = model.decode(params, state.token, state.cache)
        return _choose(fixed, logits, state._replace(cache=cache))

    state = _start(model, params, fixed, sizes)
    return jax.lax.while_loop(goes_on, body, state).out


@functools.partial(jax.jit, static_argnums=(0, 3))
def _first(model, params, fixed, sizes) -> _State:
    return _start(model, params, fixed, sizes)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _next(model, params, fixed, state, cache) -> _State:
    logits, cache = model.decode(params, state.token, cache)
    return _choose(fixed, logits, state._replace(cache=cache))


def _start(model: StepModel, params: Any, fixed: _Fixed, sizes: Sizes) -> _State:
    """Reads the prompts and chooses the first token."""
    rows = fixed.ids.shape[0]
    cache = model.init_cache(params, rows, sizes.slots)
    logits, cache = model.prefill(params, fixed.ids, fixed.lengths, cache)
    zeros = jnp.zeros(rows, jnp.int32)
    grid = jnp.zeros((rows, sizes.new), jnp.int32)
    records = jax.tree.map(
        lambda x: jnp.zeros((sizes.new, *x.shape), x.dtype), recorded(logits).record
    )
    out = Generation(grid, zeros, zeros, zeros, grid.astype(jnp.float32), records)
    active = jnp.ones(rows, bool)
    state = _State(out, active, zeros, jnp.zeros((), jnp.int32), cache)
    return _choose(fixed, logits, state)


def _choose(fixed: _Fixed, found: chex.Array | Recorded, state: _State) -> _State:
    """Chooses a token for every active row and writes it down."""
    out, active, step = state.out, state.active, state.step
    logits, record = recorded(found)
    logits = logits.astype(jnp.float32)
    context = Context(fixed.ids, fixed.lengths, out.tokens, step)
    scores = logits if fixed.process is None else fixed.process(logits, context)
    top = jnp.max(scores, axis=1)
    token = _draw(fixed.keys, scores, step)
    own = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    logprob = own - jax.nn.logsumexp(logits, axis=1)

    good = active & jnp.isfinite(top)
    token, logprob = jnp.where(good, token, 0), jnp.where(good, logprob, 0)
    tokens, logprobs = (
        jax.lax.dynamic_update_slice_in_dim(grid, column[:, None], step, axis=1)
        for grid, column in ((out.tokens, token), (out.logprobs, logprob))
    )
    ends = jnp.where(good, stopped(fixed.stop, tokens, step), 0)
    nothing = top == -jnp.inf
    why = jnp.where(ends > 0, int(Reason.STOP), int(Reason.LENGTH))
    wrong = jnp.where(nothing, int(Reason.NO_TOKEN), int(Reason.NOT_FINITE))
    why = jnp.where(good, why, wrong).astype(jnp.int32)
    out = Generation(
        tokens=tokens,
        lengths=out.lengths + good.astype(jnp.int32),
        stop_lengths=jnp.where(active, ends, out.stop_lengths),
        reasons=jnp.where(active, why, out.reasons),
        logprobs=logprobs,
        records=_keep(out.records, record, good, step),
    )
    return _State(out, good & (ends == 0), token, step + 1, state.cache)


def _keep(records, record, rows, step):
    """Writes the record of a step, where rows [B] took part in it."""

    def leaf(all_steps, x):
        if x.shape[:1] != rows.shape:
            raise ValueError(
                f"generate: records must lead with {rows.shape[0]} rows, found "
                f"{x.shape}"
            )
        x = jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
        return jax.lax.dynamic_update_index_in_dim(all_steps, x, step, axis=0)

    return jax.tree.map(leaf, records, record)


def _draw(keys, scores, step):
    """The best token of every row; with keys, of the scores with Gumbel noise."""
    if keys is not None:
        shape = scores.shape[1:]

        def noise(key):
            return jax.random.gumbel(jax.random.fold_in(key, step), shape, jnp.float32)

        scores = scores + jax.vmap(noise)(keys)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)
