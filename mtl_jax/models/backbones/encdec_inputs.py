"""What the calls of an encoder-decoder take, checked and put in order."""

from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp

from mtl_jax.models.layers.causal_attention import ATTENTIONS
from mtl_jax.models.layers.prefix import check_prefix

Prefix = Mapping[str, Mapping[str, chex.Array]]
_SIDES = ("encoder", "decoder", "cross")


def shift_right(
    targets: chex.Array, segment_ids: chex.Array | None = None, *, start: int = 0
) -> chex.Array:
    """What a decoder reads to predict targets: each behind the one before it.

    Args:
      targets: [B, L] integer.
      segment_ids: [B, L] integer, 0 = padding; None = one segment per row.
      start: token in front of every segment.

    Returns:
      [B, L].

    Raises:
      ValueError: if the shapes differ.

    >>> shift_right(jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 2, 2]]), start=3)
    Array([[3, 5, 3, 7]], dtype=int32)
    """
    if segment_ids is None:
        segment_ids = jnp.ones_like(targets)
    if segment_ids.shape != targets.shape:
        raise ValueError(
            f"shift_right: segment_ids are {segment_ids.shape}, targets {targets.shape}"
        )
    behind = ((0, 0), (1, 0))
    shifted = jnp.pad(targets[:, :-1], behind)
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], behind)
    return jnp.where(same, shifted, jnp.asarray(start, targets.dtype))


def check_options(module: Any) -> None:
    """Refuses options that do not exist or do not go together.

    Raises:
      ValueError: naming the option.
    """
    known = {
        "norm": ("rms", "layer"),
        "position": ("relative", "learned"),
        "attention": ATTENTIONS,
    }
    for name, values in known.items():
        if (value := getattr(module, name)) not in values:
            raise ValueError(
                f"EncoderDecoder: {name} must be one of {values}, is {value!r}"
            )
    if module.num_heads % (module.num_kv_heads or module.num_heads):
        raise ValueError(
            "EncoderDecoder: num_kv_heads must divide num_heads, found "
            f"{module.num_kv_heads} and {module.num_heads}"
        )
    if module.position == "learned" and module.max_positions is None:
        raise ValueError("EncoderDecoder: learned positions want max_positions")


def check_tokens(
    module: Any, name: str, input_ids: chex.Array, arrays: Mapping[str, Any]
) -> None:
    """Refuses tokens that are no rows, companions of other shapes, and long rows.

    Raises:
      ValueError: naming the method and the argument.
    """
    where = f"EncoderDecoder.{name}"
    if input_ids.ndim != 2:
        raise ValueError(f"{where}: input_ids must be [B, L], is {input_ids.shape}")
    for key, array in arrays.items():
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(
                f"{where}: {key} is {array.shape}, input_ids {input_ids.shape}"
            )
    length, limit = input_ids.shape[1], module.max_positions
    if limit is not None and length > limit and all(a is None for a in arrays.values()):
        raise ValueError(
            f"{where}: input_ids may have at most {limit} positions, found {length}"
        )
    if module.position == "relative" and arrays["positions"] is not None:
        raise ValueError(f"{where}: positions belong to position='learned'")


def memory_segments(
    memory: chex.Array | None,
    segment_ids: chex.Array | None,
    cache: Mapping[str, Any] | None,
) -> chex.Array:
    """Segments [B, S] of what a decoder reads, those given or those in the cache.

    Raises:
      ValueError: if there is nothing to read, or shapes disagree.
    """
    where = "EncoderDecoder.decode"
    if memory is None:
        if cache is None or segment_ids is not None:
            raise ValueError(
                f"{where}: wanted a memory or a cache that has one, and "
                "memory_segment_ids with a memory only"
            )
        return cache["memory_segments"]
    shape = memory.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    if segment_ids.shape != shape:
        raise ValueError(
            f"{where}: memory_segment_ids is {segment_ids.shape}, memory {memory.shape}"
        )
    segment_ids = segment_ids.astype(jnp.int32)
    if cache is None:
        return segment_ids
    if cache["memory_segments"].shape != shape:
        raise ValueError(
            f"{where}: memory is {memory.shape}, the cache was made for "
            f"{cache['memory_segments'].shape}"
        )
    return (segment_ids != 0).astype(jnp.int32)


def check_rows(input_ids: chex.Array, segments: chex.Array) -> None:
    """Refuses rows that cannot be dealt to those of the memory.

    Raises:
      ValueError: with both numbers.
    """
    rows, read = input_ids.shape[0], segments.shape[0]
    if rows % max(read, 1):
        raise ValueError(
            f"EncoderDecoder.decode: input_ids has {rows} rows, no multiple of the "
            f"{read} of the memory"
        )


def own_inputs(
    module: Any, prefix: Prefix | None, **sides: tuple[str, int]
) -> dict[str, Any]:
    """The parts of a prefix that a stack reads, by the names that its blocks know.

    Args:
      module: the encoder-decoder.
      prefix: parts by side, or None.
      **sides: of a side, its name in the blocks and the rows of the batch.

    Raises:
      ValueError: for a side that does not exist, or shapes that disagree.
    """
    prefix = prefix or {}
    if unknown := sorted(set(prefix) - set(_SIDES)):
        raise ValueError(
            f"EncoderDecoder: prefix has {', '.join(unknown)}, known: "
            f"{', '.join(_SIDES)}"
        )
    own = {}
    for side, (name, rows) in sides.items():
        if side not in prefix:
            continue
        own[name] = prefix[side]
        check_prefix(
            f"EncoderDecoder: prefix {side}",
            prefix[side],
            depth=module.depth_of_encoder if side == "encoder" else module.depth,
            batch=rows,
            heads=module.num_kv_heads or module.num_heads,
            dim=module.dim_of_head,
        )
    return own
