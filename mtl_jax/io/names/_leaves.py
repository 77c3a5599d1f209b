"""Leaves on their way to a device: described, read into a buffer, handed over."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

_ALIGN = 64  # bytes, for a buffer that a CPU device takes as it is


class HostLeaf(NamedTuple):
    """An array known by shape and dtype, brought to the host when asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None):
        del copy
        return np.asarray(self.read(), dtype)


def described(tensors: Any, name: str, hook: Any) -> tuple[HostLeaf | None, str]:
    """Shape and dtype that `hook` gives, unread; or None, and what is wrong."""
    if hasattr(tensors, "dtype"):
        shape, dtype = tensors.shape(name), tensors.dtype(name)
    else:
        shape, dtype = np.shape(tensors[name]), np.dtype(tensors[name].dtype)
    if hook.ndim not in (None, len(shape)):
        return None, f"wrong shape: {name!r} is {shape}, wanted {hook.ndim} axes"
    try:
        ours = hook.load(np.broadcast_to(np.zeros((), dtype), shape))
    except ValueError as error:
        return None, f"wrong shape: {name!r} is {shape}: {error}"
    return HostLeaf(ours.shape, dtype, lambda: ours), ""


def empty(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer for a leaf, aligned as devices want it.

    Raises:
      ValueError: for a 64-bit dtype that JAX would narrow.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name!r} is {dtype}, which JAX would narrow; switch jax_enable_x64 on to "
            "read it"
        )
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


def read_into(out: np.ndarray, tensors: Any, name: str, hook: Any) -> None:
    """Reads `out` through a view in the foreign layout, where there is one."""
    foreign = hook.save(out)
    if hasattr(tensors, "read_into") and np.may_share_memory(foreign, out):
        tensors.read_into(name, foreign)
    else:
        out[...] = hook.load(np.asarray(tensors[name]))


def placed(buffer: np.ndarray, sharding: Any = None) -> jax.Array:
    """Hands a buffer over; the next one is not made while it is still being copied."""
    return jax.device_put(buffer, sharding).block_until_ready()


def to_device(name: str, array: np.ndarray, sharding: Any = None) -> jax.Array:
    """A JAX array that shares no memory with `array`, which may be a mapped file.

    Raises:
      ValueError: for a 64-bit dtype that JAX would narrow.
    """
    buffer = empty(name, array.shape, array.dtype)
    buffer[...] = array
    return placed(buffer, sharding)
