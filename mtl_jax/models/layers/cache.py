"""Keys and values that a decoder has seen, in buffers of a fixed length."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class LayerCache(NamedTuple):
    """Buffers of one layer, or of a scanned stack with the layer that is meant.

    Attributes:
      key: [B, S, K, d], or [depth, B, S, K, d] with `layer`.
      value: like `key`.
      layer: int32 scalar, or None.
    """

    key: chex.Array
    value: chex.Array
    layer: chex.Array | None = None


def init_cache(
    model: Any,
    batch: int,
    length: int,
    dtype: DTypeLike | None = None,
    *,
    memory: int | None = None,
) -> dict[str, Any]:
    """An empty cache for a decoder, or for the decoder of an encoder-decoder.

    Args:
      model: a `models.Decoder` or `models.EncoderDecoder`.
      batch: B, number of rows.
      length: S, tokens that a row can hold.
      dtype: of keys and values; None = the compute dtype of the model.
      memory: M, tokens that the encoder of an encoder-decoder reads.

    Returns:
      {"layers": {"key", "value"}}, each [depth, B, S, K, d], for a scanned model,
      {"layers_0": {"key", "value"}, ...}, each [B, S, K, d], for an unrolled one, and
      "length" [B] int32, the tokens that each row holds. With `memory` a layer also
      has "memory_key" and "memory_value" of M in place of S, what it makes of the
      encoder's output, and there is "memory_segments" [B, M] int32.

    Raises:
      ValueError: if `length` exceeds the context of the model, or if `memory` is
        missing or has no encoder.
    """
    limit = math.inf if model.max_positions is None else model.max_positions
    if not 1 <= length <= limit:
        raise ValueError(
            f"init_cache: length must lie in [1, {limit}], the context of the model, "
            f"is {length}"
        )
    if (memory is None) == hasattr(model, "encoder_depth"):
        raise ValueError(
            f"init_cache: memory belongs to encoder-decoders and is {memory} for "
            f"{type(model).__name__}"
        )
    dtype = dtype or model.dtype or model.param_dtype
    heads = model.num_kv_heads or model.num_heads
    stacked = bool(model.scan and model.depth)
    names = ["layers"] if stacked else [f"layers_{i}" for i in range(model.depth)]
    sizes = {"key": length, "value": length}
    cache = {"length": jnp.zeros(batch, jnp.int32)}
    if memory is not None:
        sizes |= {"memory_key": memory, "memory_value": memory}
        cache["memory_segments"] = jnp.zeros((batch, memory), jnp.int32)
    axes = (model.depth,) if stacked else ()
    for name in names:
        cache[name] = {
            kind: jnp.zeros((*axes, batch, size, heads, model.dim_of_head), dtype)
            for kind, size in sizes.items()
        }
    return cache


def reorder_cache(cache: Mapping[str, Any], rows: chex.Array) -> dict[str, Any]:
    """Picks rows of a cache, as beam search does.

    Args:
      cache: what `init_cache` makes.
      rows: [B'] integer.

    Returns:
      The cache of those rows.
    """
    return {
        name: jax.tree.map(
            lambda x, axis=int(name == "layers"): jnp.take(x, rows, axis=axis), part
        )
        for name, part in cache.items()
    }


def read_cache(cache: LayerCache) -> tuple[chex.Array, chex.Array]:
    """Keys and values of the layer, each [B, S, K, d]."""
    return _own(cache.key, cache.layer), _own(cache.value, cache.layer)


def write_cache(
    cache: LayerCache,
    key: chex.Array,
    value: chex.Array,
    start: chex.Array,
    count: chex.Array,
) -> LayerCache:
    """Writes the first `count[b]` tokens of each row to slots `start[b]` onwards.

    What lies beyond the buffer is not written.

    Args:
      cache: the buffers.
      key: [B, L, K, d].
      value: [B, L, K, d].
      start: [B] int32.
      count: [B] int32.

    Returns:
      The new buffers, in their dtype.
    """
    write = _write_one if key.shape[1] == 1 else _write_many
    return cache._replace(
        key=write(cache.key, key.astype(cache.key.dtype), start, count, cache.layer),
        value=write(
            cache.value, value.astype(cache.value.dtype), start, count, cache.layer
        ),
    )


def fill_cache(cache: LayerCache, key: chex.Array, value: chex.Array) -> LayerCache:
    """Replaces the whole buffers of the layer by [B, S, K, d]; their dtype stays."""

    def fill(buffer, new):
        new = new.astype(buffer.dtype)
        if cache.layer is None:
            return new
        return jax.lax.dynamic_update_index_in_dim(buffer, new, cache.layer, 0)

    return cache._replace(key=fill(cache.key, key), value=fill(cache.value, value))


def _write_one(buffer, new, start, count, layer):
    """A single token: as many entries move as there are rows."""
    length = buffer.shape[-3]
    slots = jnp.where(count > 0, start, length)
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    index = (rows, slots) if layer is None else (layer, rows, slots)
    return buffer.at[index].set(new[:, 0], mode="drop")


def _write_many(buffer, new, start, count, layer):
    """Many tokens: every slot asks which token it holds, if any."""
    old = _own(buffer, layer)
    slots = jnp.arange(old.shape[1], dtype=jnp.int32)[None]
    token = slots - start[:, None]
    written = (token >= 0) & (token < count[:, None])
    token = jnp.clip(token, 0, new.shape[1] - 1)[:, :, None, None]
    picked = jnp.take_along_axis(new, token, axis=1)
    fresh = jnp.where(written[:, :, None, None], picked, old)
    if layer is None:
        return fresh
    return jax.lax.dynamic_update_index_in_dim(buffer, fresh, layer, 0)


def _own(buffer, layer):
    if layer is None:
        return buffer
    return jax.lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)
