"""Decoding as a function of arrays alone, to be compiled before there are any."""

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp

from mtl_jax.decoding._generate import Generation, _Fixed, _generate, check_tokens
from mtl_jax.decoding._models import StepModel
from mtl_jax.decoding._prompts import Sizes, Stop, stop_table


def generation_fn(
    model: StepModel, *, max_new_tokens: int, stop: Stop = ()
) -> Callable[[Any, chex.Array, chex.Array], Generation]:
    """What greedy `generate` compiles: reading the prompts, then the whole loop.

    Nothing is padded to a bucket: the cache has room for the width of the prompts and
    `max_new_tokens`, that of an encoder-decoder for the latter.

    Args:
      model: see `generate`.
      max_new_tokens: columns of the result.
      stop: see `generate`.

    Returns:
      `f(params, ids [B, P] int32, lengths [B] int32) -> Generation`, to be compiled by
      `jax.jit`, also ahead of time from shapes.

    Raises:
      ValueError: for a token that the vocabulary lacks; when called, for sizes that
        exceed the context.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"generation_fn: max_new_tokens must be 1 or more, is {max_new_tokens}"
        )
    table = stop_table(stop)
    apart = getattr(model, "encodes", False)
    check_tokens("generation_fn", model, None, table)

    def run(params, ids, lengths):
        width = ids.shape[1]
        slots = max_new_tokens if apart else width + max_new_tokens
        if model.context is not None and max(slots, width) > model.context:
            raise ValueError(
                f"generation_fn: prompts of {width} and {max_new_tokens} new "
                f"tokens exceed the context of {model.context}"
            )
        fixed = _Fixed(ids, lengths, None, None, table)
        limit = jnp.int32(max_new_tokens)
        return _generate(model, params, fixed, limit, Sizes(max_new_tokens, slots))

    return run
