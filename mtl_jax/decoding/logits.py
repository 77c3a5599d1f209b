"""Processors of next-token logits: pure functions that compose by `chain`.

A processor maps logits [B, V] and a `Context` to float32 logits [B, V]; a token that
is excluded has -inf. What a processor is made of (temperatures, tables) are leaves of
a pytree: inside a jitted function other values need no new compilation.

`temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` leave every row at
least one token that it had. `banned` and `choices` can exclude all: the row is then
-inf throughout, which `generate` reports as `Reason.NO_TOKEN`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Context",
    "Processor",
    "banned",
    "chain",
    "choices",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
]


class Context(NamedTuple):
    """What a row has seen when its next token is chosen.

    Attributes:
      prompt: [B, P] int32, padded to the right.
      prompt_lengths: [B] int32.
      generated: [B, N] int32; columns below `step` are filled.
      step: int32 scalar, tokens that were generated so far.
    """

    prompt: chex.Array
    prompt_lengths: chex.Array
    generated: chex.Array
    step: chex.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["rule"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """A rule and its values; `Processor(rule)` makes one of any pure function.

    Attributes:
      rule: `rule(logits [B, V] float32, context, *values) -> logits [B, V]`. It is
        compiled in: define it once, not anew for every call.
      values: arrays or further processors.
    """

    rule: Callable[..., chex.Array]
    values: tuple[Any, ...] = ()

    def __call__(
        self, logits: chex.Array, context: Context | None = None
    ) -> chex.Array:
        """Args: logits: [B, V]; context. Returns: [B, V] float32."""
        if logits.ndim != 2:
            raise ValueError(f"logits: wanted [B, V], found {logits.shape}")
        out = self.rule(logits.astype(jnp.float32), context, *self.values)
        if out.shape != logits.shape:
            raise ValueError(
                f"logits: the rule makes {out.shape} of logits {logits.shape}"
            )
        return out.astype(jnp.float32)

    def largest_token(self) -> int:
        """The largest token number that the tables in here name; -1 without any."""
        inner = [v.largest_token() for v in self.values if isinstance(v, Processor)]
        if self.rule in (_banned, _choices) and np.size(self.values[0]):
            inner += [int(np.max(np.asarray(v))) for v in self.values]
        return max(inner, default=-1)


def chain(*processors: Processor) -> Processor:
    """Applies processors in the order given.

    >>> both = chain(temperature(0.5), top_k(1))
    >>> both(jnp.array([[1.0, 2.0]])).tolist()
    [[-inf, 4.0]]
    """
    for processor in processors:
        if not isinstance(processor, Processor):
            raise ValueError(
                f"chain: wanted processors, found {type(processor).__name__} (wrap a "
                "function in Processor)"
            )
    return Processor(_chain, processors)


def _chain(logits, context, *processors):
    for processor in processors:
        logits = processor(logits, context)
    return logits


def temperature(value: float | chex.Array) -> Processor:
    """`logits / value`.

    Args:
      value: above 0, a number or one per row [B].

    Raises:
      ValueError: if a number is not positive and finite.
    """
    return Processor(_temperature, (_number("temperature", value, 0, np.inf),))


def _temperature(logits, context, value):
    del context
    return logits / _column(value)


def top_k(k: int | chex.Array) -> Processor:
    """Keeps the k most likely tokens, and all that are as likely as the k-th.

    Args:
      k: 1 or more, a number or one per row [B].

    Raises:
      ValueError: if a number is below 1.

    >>> top_k(2)(jnp.array([[3.0, 1.0, 2.0, 2.0]])).tolist()
    [[3.0, -inf, 2.0, 2.0]]
    """
    if isinstance(k, int) and k < 1:
        raise ValueError(f"top_k: k must be 1 or more, is {k}")
    return Processor(_top_k, (jnp.asarray(k, jnp.int32),))


def _top_k(logits, context, k):
    del context
    ones = (logits > -jnp.inf).astype(jnp.int32)
    return _keep(logits, _heaviest(logits, ones, _column(k)))


def top_p(p: float | chex.Array) -> Processor:
    """Keeps the nucleus, the smallest set of most likely tokens with mass p.

      keep = {v : P(v) >= t}, t the largest threshold with P(keep) >= p

    Tokens that are equally likely stay or go together, so that the nucleus does not
    depend on how the vocabulary is numbered; it holds one token at least.

    Args:
      p: in (0, 1], a number or one per row [B]; 1 keeps all.

    Raises:
      ValueError: if a number is not in (0, 1].

    >>> kept = top_p(0.6)(jnp.log(jnp.array([[0.5, 0.3, 0.2]])))
    >>> [round(float(x), 2) for x in kept[0]]
    [-0.69, -1.2, -inf]

    **Follows**: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".

    **Differs**: implementations that sort keep as many of the equally likely tokens
    at the border as they need.
    """
    return Processor(_top_p, (_number("top_p", p, 0, 1),))


def _top_p(logits, context, p):
    del context
    p = _column(p)
    mass = jax.nn.softmax(logits, axis=-1)
    return _keep(logits, _heaviest(logits, mass, p) | (p >= 1))


def min_p(p: float | chex.Array) -> Processor:
    """Keeps tokens at least p times as likely as the most likely one.

    Args:
      p: in (0, 1], a number or one per row [B].

    Raises:
      ValueError: if a number is not in (0, 1].

    >>> min_p(0.5)(jnp.array([[0.0, -0.6, -0.8]])).tolist()
    [[0.0, -0.6000000238418579, -inf]]

    **Follows**: Nguyen et al. 2025, "Turning Up the Heat: Min-p Sampling for Creative
    and Coherent LLM Outputs".
    """
    return Processor(_min_p, (_number("min_p", p, 0, 1),))


def _min_p(logits, context, p):
    del context
    best = jnp.max(logits, axis=-1, keepdims=True)
    return _keep(logits, logits >= best + jnp.log(_column(p)))


def repetition_penalty(value: float | chex.Array) -> Processor:
    """Divides positive logits of tokens already seen, multiplies negative ones.

    Seen is what the prompt or the generated text of the row holds.

    Args:
      value: above 0, a number or one per row [B]; above 1 discourages.

    Raises:
      ValueError: if a number is not positive and finite.

    **Follows**: Keskar et al. 2019, "CTRL", section 4.1.

    **Differs**: negative logits are multiplied, as implementations do; the paper
    divides all, which would favour repetition of unlikely tokens.
    """
    value = _number("repetition_penalty", value, 0, np.inf)
    return Processor(_repetition_penalty, (value,))


def _repetition_penalty(logits, context, value):
    if context is None:
        raise ValueError("repetition_penalty: needs a context")
    value = _column(value)
    inside = _columns(context.prompt) < context.prompt_lengths[:, None]
    seen = _mark(logits, context.prompt, inside)
    inside = _columns(context.generated) < context.step
    seen |= _mark(
        logits,
        context.generated,
        jnp.broadcast_to(inside, context.generated.shape),
    )
    less = jnp.where(logits > 0, logits / value, logits * value)
    return jnp.where(seen, less, logits)


def banned(tokens: Sequence[int] | chex.Array) -> Processor:
    """Excludes tokens.

    Args:
      tokens: their numbers.

    Raises:
      ValueError: if a number is negative.

    >>> banned([0, 2])(jnp.zeros((1, 4))).tolist()
    [[-inf, 0.0, -inf, 0.0]]
    """
    return Processor(_banned, (_tokens("banned", tokens),))


def _banned(logits, context, tokens):
    del context
    return logits.at[:, tokens].set(-jnp.inf)


def choices(candidates: Sequence[Sequence[int]], end: int) -> Processor:
    """Only what continues one of the candidates; after a whole one, only `end`.

    Pass `end` to `generate` as a stop. A candidate may begin another one. A row that
    has left all candidates may go nowhere: all of it is -inf.

    Args:
      candidates: N token sequences, none empty.
      end: the token after a candidate, such as the end of text.

    Raises:
      ValueError: if there are no candidates, an empty one, or a negative number.
    """
    if not len(candidates) or not all(len(c) for c in candidates):
        raise ValueError(
            "choices: wanted one or more candidates, each of one or more tokens"
        )
    rows = [_tokens(f"choices: candidate {i}", c) for i, c in enumerate(candidates)]
    _tokens("choices: end", [end])
    width = max(map(len, rows))
    table = np.full((len(rows), width), -1, np.int32)
    for row, tokens in zip(table, rows, strict=True):
        row[: len(tokens)] = tokens
    return Processor(_choices, (table, np.int32(end)))


def _choices(logits, context, table, end):
    if context is None:
        raise ValueError("choices: needs a context")
    table, width, step = jnp.asarray(table), table.shape[1], context.step
    generated = context.generated[:, :width]
    missing = width - generated.shape[1]
    generated = jnp.pad(generated, ((0, 0), (0, missing)), constant_values=-2)
    same = generated[:, None, :] == table[None, :, :]
    later = jnp.arange(width, dtype=jnp.int32) >= step
    lengths = jnp.sum((table >= 0).astype(jnp.int32), axis=1)
    alive = jnp.all(same | later[None, None, :], axis=2) & (step <= lengths)[None]
    column = jax.lax.dynamic_index_in_dim(
        table, jnp.minimum(step, width - 1), axis=1, keepdims=False
    )
    following = jnp.where(step < lengths, column, end)
    allowed = _mark(logits, jnp.broadcast_to(following[None], alive.shape), alive)
    return _keep(logits, allowed)


def _keep(logits, keep):
    return jnp.where(keep | jnp.isnan(logits), logits, -jnp.inf)


def _mark(logits, tokens, valid):
    """[B, V] bool: the tokens [B, n] of each row that are valid [B, n]."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    tokens = jnp.where(valid, tokens, logits.shape[1])
    return jnp.zeros(logits.shape, bool).at[rows, tokens].set(True, mode="drop")


def _heaviest(logits, weights, target):
    """The smallest upper set of the logits whose weights [B, V] sum to the target.

    The threshold is found bit by bit, from counts alone: no sorting.
    """
    logits = jnp.where(logits == 0, 0.0, logits)  # One zero only.
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    top = jnp.uint32(1 << 31)
    ordered = jnp.where(bits >= top, ~bits, bits | top)
    zero = jnp.zeros((), weights.dtype)

    def bit(i, threshold):
        higher = threshold | (top >> i.astype(jnp.uint32))
        mass = jnp.sum(
            jnp.where(ordered >= higher, weights, zero), axis=1, keepdims=True
        )
        return jnp.where(mass >= target, higher, threshold)

    start = jnp.zeros((logits.shape[0], 1), jnp.uint32)
    return ordered >= jax.lax.fori_loop(0, 32, bit, start)


def _columns(x):
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


def _column(value):
    """A number as it is, one per row as [B, 1]."""
    value = jnp.asarray(value)
    return value[:, None] if value.ndim else value


def _number(name, value, low, high):
    if isinstance(value, int | float):
        if not low < value <= high or value == np.inf:
            limit = "" if high == np.inf else f" and at most {high}"
            raise ValueError(f"{name}: must be finite, above {low}{limit}, is {value}")
        return np.float32(value)
    return value.astype(jnp.float32)


def _tokens(name, tokens):
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    if tokens.size and tokens.min() < 0:
        raise ValueError(
            f"{name}: token numbers are not negative, found {tokens.min()}"
        )
    return tokens
