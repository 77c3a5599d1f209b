"""Programs that draw: random bits, coins, and ranks in rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit changes about half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def random_bits(key: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """Uniform uint32 that depend on the key and the index in the tensor alone.

    Args:
      key: uint32 [2].
      start: uint32 [2], low and high half of the index of the first entry.
      length: how many.
    """
    low = start[0] + jax.lax.iota(jnp.uint32, length)
    high = start[1] + (low < start[0]).astype(jnp.uint32)
    return _mix(_mix(low + key[0]) + key[1] + high * jnp.uint32(0x9E3779B9))


def share(u: jax.Array) -> jax.Array:
    """Uniform in [0, 1)."""
    return (u >> 8).astype(jnp.float32) * jnp.float32(2**-24)


@jax.jit
def rivals(
    values: jax.Array, keys: jax.Array, start: jax.Array, chances: jax.Array, rows: Any
) -> jax.Array:
    """Draws for every entry the place of another one of its row.

    An entry is above a random other one with the chance rank / (n - 1): with u = low +
    (high - low) q / (n - 1), that other one is the floor(q)-th.

    Args:
      values: uint32 [T, C], of which only the shape counts.
      keys: uint32 [T, 2].
      start: uint32 [2], of the chunk.
      chances: float32 [T, 2], low and high.
      rows: int32 [C], index of the first entry of the row, and int32, its last rank.

    Returns:
      int32 [T, C].
    """
    first, last = rows
    own = jax.lax.iota(jnp.int32, values.shape[1]) - first
    places = []
    for t in range(values.shape[0]):
        u = share(random_bits(keys[t], start, values.shape[1]))
        low, high = chances[t]
        spread = jnp.where(high > low, high - low, jnp.float32(1))
        q = jnp.floor((u - low) / spread * last.astype(jnp.float32))
        other = jnp.clip(q.astype(jnp.int32), 0, last - 1)
        places.append(first + other + (other >= own).astype(jnp.int32))
    return jnp.stack(places)


@jax.jit
def look_up(values: jax.Array, places: jax.Array) -> jax.Array:
    """values[t, places[t]]; on its own, as nothing that it is fused with vectorises."""
    return jnp.stack(
        [
            row.at[place].get(mode="clip")
            for row, place in zip(values, places, strict=True)
        ]
    )


@jax.jit
def rank_mask(
    values: jax.Array,
    others: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    chances: jax.Array,
    rows: Any,
) -> jax.Array:
    """Which entries are kept: uint8 [ceil(T / 8), C], bit t % 8 of t // 8.

    Between equals a bit decides: so each has the chance of their mean rank.

    Args:
      values: uint32 [T, C], magnitudes.
      others: uint32 [T, C], magnitudes at `rivals`.
      keys: as in `rivals`, and so are the others.
      start: of the chunk.
      chances: low and high.
      rows: index of the first entry of the row, and its last rank.
    """
    packed = [jnp.zeros(values.shape[1], jnp.uint8)] * -(-len(values) // 8)
    for t in range(len(values)):
        u = random_bits(keys[t], start, values.shape[1])
        uniform, own, other = share(u), values[t], others[t]
        low, high = chances[t]
        above = (own > other) | ((own == other) & ((u & 1) == 1))
        # A row of one entry has no order.
        inside = jnp.where(rows[1] > 0, above, uniform < (low + high) / 2)
        keep = (uniform < low) | ((uniform < high) & inside)
        packed[t // 8] |= keep.astype(jnp.uint8) << (t % 8)
    return jnp.stack(packed)


def tossed(args: Any, t: int, length: int) -> jax.Array:
    """Whether entries of a task are kept, by coins."""
    u = random_bits(args["keys"][t], args["start"], length)
    return (u < args["edges"][t]) | args["always"][t]


@functools.partial(jax.jit, static_argnames="length")
def coin_mask(args: Any, *, length: int) -> jax.Array:
    """What coins select: uint8 [ceil(T / 8), C], bit t % 8 of t // 8."""
    count = args["keys"].shape[0]
    packed = [jnp.zeros(length, jnp.uint8)] * -(-count // 8)
    for t in range(count):
        packed[t // 8] |= tossed(args, t, length).astype(jnp.uint8) << (t % 8)
    return jnp.stack(packed)
