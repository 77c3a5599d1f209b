"""Causal self-attention with grouped heads, segments, windows, prefixes and a cache."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax.models.layers.cache import LayerCache, read_cache, write_cache
from mtl_jax.models.layers.norm import RmsNorm
from mtl_jax.models.layers.prefix import in_front
from mtl_jax.models.layers.remat import keep_product
from mtl_jax.models.layers.rotary import rotate

ATTENTIONS = ("einsum", "blocked", "fused")
# Absorbs any finite logit, yet a row without keys stays finite.
_MASKED = -1e30
_BLOCK = 256
_INIT = nn.initializers.normal(0.02)


class AttentionContext(NamedTuple):
    """What the attention of all layers shares.

    Attributes:
      query_segments: [B, L] int32, 0 = padding.
      key_segments: [B, S] int32; S = L, or the length of the cache.
      query_slots: [B, L] int32, where the queries stand among the keys.
      key_slots: [B, S] int32.
      rotary: (cosines, sines) of the queries, each [B, L, d / 2], or None.
      start: [B] int32, slots of the cache that were full before; None without one.
      count: [B] int32, tokens that are added to the cache.
      mask: [B, L, S] bool, `visible` of the above where it is worth keeping.
      bias: [B, H, L, S] or [1, H, L, S] float32, added to the logits; None = 0.
        A prefix has none.
    """

    query_segments: chex.Array
    key_segments: chex.Array
    query_slots: chex.Array
    key_slots: chex.Array
    rotary: tuple[chex.Array, chex.Array] | None = None
    start: chex.Array | None = None
    count: chex.Array | None = None
    mask: chex.Array | None = None
    bias: chex.Array | None = None


def visible(context: AttentionContext, window: Any = None) -> chex.Array:
    """Which key each query sees: its own segment's, not later, inside the window.

    Args:
      context: segments and slots.
      window: number of slots that a query looks back on, itself included; 0 or None
        = all. May be traced.

    Returns:
      [B, L, S] bool.
    """
    mask = context.mask
    distance = context.query_slots[:, :, None] - context.key_slots[:, None, :]
    if mask is None:
        same = context.query_segments[:, :, None] == context.key_segments[:, None, :]
        mask = same & (distance >= 0)
    if window is not None:
        mask = mask & ((distance < window) | (window == 0))
    return mask


def make_context(
    shape: tuple[int, int],
    segment_ids: chex.Array | None,
    positions: chex.Array | None,
    cache: Mapping[str, Any] | None,
) -> tuple[AttentionContext, chex.Array]:
    """Segments and slots of a batch of rows, with or without a cache.

    Args:
      shape: (B, L).
      segment_ids: [B, L], see `models.Decoder`.
      positions: [B, L] or None.
      cache: what `init_cache` makes, or None.

    Returns:
      (context without rotary tables and mask, positions [B, L]).
    """
    ones = jnp.ones(shape, jnp.int32)
    segments = ones if segment_ids is None else segment_ids.astype(jnp.int32)
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if cache is None:
        if positions is None:
            positions = slots if segment_ids is None else restarts(segments)
        return AttentionContext(segments, segments, slots, slots), positions
    buffer = next(x for name, x in cache.items() if name.startswith("layers"))["key"]
    size, start = buffer.shape[-3], cache["length"]
    segments = (segments != 0).astype(jnp.int32)
    count = jnp.sum(segments, axis=1)
    key_slots = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (shape[0], size))
    keys = (key_slots < (start + count)[:, None]).astype(jnp.int32)
    slots = slots + start[:, None]
    context = AttentionContext(
        segments, keys, slots, key_slots, start=start, count=count
    )
    return context, slots if positions is None else positions


def look_around(
    query_segments: chex.Array, key_segments: chex.Array
) -> AttentionContext:
    """A context whose queries see all keys of their segment, wherever they stand.

    Args:
      query_segments: [B, L] int32, 0 = padding.
      key_segments: [B, S] int32, 0 = padding.

    Returns:
      The context, for an encoder or for attention to what an encoder put out.
    """
    return AttentionContext(
        query_segments,
        key_segments,
        query_slots=jnp.zeros_like(query_segments),
        key_slots=jnp.zeros_like(key_segments),
    )


def overflow_is_nan(x: chex.Array, context: AttentionContext) -> chex.Array:
    """Makes rows NaN that hold more tokens than their cache; x: [B, ...]."""
    if context.start is None:
        return x
    full = context.start + context.count > context.key_slots.shape[1]
    full = full.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(full, jnp.asarray(jnp.nan, x.dtype), x)


def restarts(segment_ids: chex.Array) -> chex.Array:
    """Positions that count from 0 wherever the segment changes.

    Args:
      segment_ids: [B, L] integer.

    Returns:
      [B, L] int32.

    >>> restarts(jnp.array([[1, 1, 2, 2, 2, 0]]))
    Array([[0, 1, 0, 1, 2, 0]], dtype=int32)
    """
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    slots = jnp.broadcast_to(slots, segment_ids.shape)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    return slots - jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


def grouped_attend(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    mask: chex.Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: chex.Array | None = None,
) -> chex.Array:
    """`softmax(scale Q K^T + bias) V`; every G = H / K query heads share a key head.

    Args:
      query: [B, L, H, d].
      key: [B, S, K, d], K divides H.
      value: [B, S, K, d].
      mask: [B, L, S] bool, True = attend. A query without keys attends uniformly.
      scale: of the logits.
      softcap: c, logits become `c tanh(logits / c)` before the mask; None = as is.
      bias: [B, H, L, S] or [1, H, L, S] float32, or None.

    Returns:
      [B, L, H, d] in the dtype of `value`; logits and softmax are float32.

    **Follows**: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query
    Transformer Models from Multi-Head Checkpoints".
    """
    batch, length, heads, dim = query.shape
    shared, group = key.shape[2], heads // key.shape[2]
    # The small arrays are transposed, so that the large logits need not be.
    query = query.reshape(batch, length, shared, group, dim)
    query = jnp.transpose(query, (0, 2, 3, 1, 4)).reshape(batch, shared, -1, dim)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    logits = scale * jnp.einsum(
        "bkqd,bksd->bkqs", query, key, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    grouped = (batch, shared, group, length, -1)
    logits = logits.reshape(grouped)
    if bias is not None:
        logits = logits + bias.reshape(-1, shared, *logits.shape[2:])
    logits = jnp.where(mask[:, None, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, shared, group * length, -1)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, value).reshape(grouped)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


class Heads(nn.Module):
    """The identity on [B, L, H, d], what every head puts out before the projection.

    A place to read and to edit: `nn.intercept_methods` and `capture_intermediates`
    find it under the name `heads` in every attention.
    """

    def __call__(self, x: chex.Array) -> chex.Array:
        """Args: x: [B, L, H, d]. Returns: x."""
        return x


class ProjectedAttention(nn.Module):
    """Attention whose `query`, `key`, `value` and `out` are `nn.Dense`.

    Attributes:
      num_heads: H.
      num_kv_heads: K, divides H.
      head_dim: d.
      qkv_bias: give query, key and value a bias.
      out_bias: give the output a bias.
      qk_norm: RMS norm of queries and keys before the rotation: None, "head" (each
        head alone) or "projection" (all heads together).
      norm_eps: epsilon of that norm.
      norm_unit_offset: its `unit_offset`.
      scale: of the logits; None = d^-1/2.
      softcap: of the logits, or None.
      implementation: "einsum" (the whole [L, S] at once), "blocked" (queries in
        blocks, recomputed in the backward pass: memory linear in L) or "fused"
        (`jax.nn.dot_product_attention`; no softcap).
      dtype: compute dtype; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    scale: float | None = None
    softcap: float | None = None
    implementation: str = "einsum"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def _heads(self, name, x, count):
        y = self._dense(name, x, count * self.head_dim, self.qkv_bias)
        kind = self.qk_norm if name != "value" else None
        if kind == "projection":
            y = self._norm(name)(y)
        y = y.reshape(*x.shape[:2], count, self.head_dim)
        return self._norm(name)(y) if kind == "head" else y

    def _project(self, heads, shape):
        """[B, L, D] of `shape` from what the heads put out."""
        heads = Heads(name="heads")(heads.reshape(*shape[:2], *heads.shape[2:]))
        heads = keep_product(heads.reshape(*shape[:2], -1))
        return self._dense("out", heads, shape[-1], self.out_bias)

    def _norm(self, name):
        return RmsNorm(
            self.norm_eps,
            self.norm_unit_offset,
            self.dtype,
            self.param_dtype,
            name=f"norm_{name}",
        )

    def _dense(self, name, x, width, bias):
        dense = nn.Dense(
            width,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
            name=name,
        )
        return keep_product(dense(x))

    def _attend(self, query, key, value, context, window):
        """[B, L, H, d], by the chosen implementation."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        extra = key.shape[1] - context.key_slots.shape[1]
        if context.bias is not None:
            bias = jnp.pad(context.bias, ((0, 0), (0, 0), (0, 0), (extra, 0)))
            context = context._replace(bias=bias)
        if self.implementation == "blocked":
            return _blocked(
                query, key, value, context, window, extra, scale, self.softcap
            )
        mask = _see_prefix(visible(context, window), extra)
        if self.implementation == "fused":
            return jax.nn.dot_product_attention(
                query, key, value, context.bias, mask[:, None], scale=scale
            )
        options = {"scale": scale, "softcap": self.softcap, "bias": context.bias}
        return grouped_attend(query, key, value, mask, **options)


class CausalSelfAttention(ProjectedAttention):
    """Attention of tokens to themselves, causal unless the context looks around."""

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        context: AttentionContext,
        *,
        window: Any = None,
        prefix: dict[str, chex.Array] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[chex.Array, LayerCache | None]:
        """Attends over the tokens, the cache and the prefix.

        Args:
          x: [B, L, D].
          context: see `AttentionContext`.
          window: see `visible`.
          prefix: {"key", "value"}, each [P, K, d] or [B, P, K, d], in front of all
            others: seen by every query, never rotated.
          cache: keys and values so far, or None.

        Returns:
          ([B, L, D], the cache with the keys and values of x).
        """
        query = self._heads("query", x, self.num_heads)
        key = self._heads("key", x, self.num_kv_heads)
        value = self._heads("value", x, self.num_kv_heads)
        if context.rotary is not None:
            query, key = (rotate(y, *context.rotary) for y in (query, key))
        if cache is not None:
            cache = write_cache(cache, key, value, context.start, context.count)
            key, value = (y.astype(query.dtype) for y in read_cache(cache))
        key, value = in_front(prefix, key, value)
        heads = self._attend(query, key, value, context, window)
        return self._project(heads, x.shape), cache


def _blocked(query, key, value, context, window, extra, scale, softcap):
    """`grouped_attend` on one block of queries after the other."""
    length = query.shape[1]
    size = min(_BLOCK, length)
    blocks = -(-length // size)

    def cut(x):
        """[B, L, ...] -> [blocks, B, size, ...], zeros at the end."""
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, blocks * size - length)
        x = jnp.pad(x, pad).reshape(x.shape[0], blocks, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def one(block):
        query, segments, slots, bias = block
        own = context._replace(query_segments=segments, query_slots=slots, mask=None)
        mask = _see_prefix(visible(own, window), extra)
        if bias is not None:
            bias = jnp.swapaxes(bias, 1, 2)
        options = {"scale": scale, "softcap": softcap, "bias": bias}
        return grouped_attend(query, key, value, mask, **options)

    bias = None if context.bias is None else jnp.swapaxes(context.bias, 1, 2)
    inputs = (query, context.query_segments, context.query_slots, bias)
    out = jnp.moveaxis(jax.lax.map(one, jax.tree.map(cut, inputs)), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _see_prefix(mask, extra):
    """Lets every query see `extra` keys in front."""
    if not extra:
        return mask
    return jnp.pad(mask, ((0, 0), (0, 0), (extra, 0)), constant_values=True)
