"""All compiled kernels by name, for ahead-of-time compilation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.kernels import bits
from mtl_jax.kernels.gram import shapes as gram_shapes
from mtl_jax.kernels.gram.api import gram
from mtl_jax.kernels.masked_restore import shapes as restore_shapes
from mtl_jax.kernels.masked_restore.api import masked_restore
from mtl_jax.kernels.tall_pack import shapes as pack_shapes
from mtl_jax.kernels.tall_pack.api import tall_pack
from mtl_jax.kernels.weighted_combine import shapes as combine_shapes
from mtl_jax.kernels.weighted_combine.api import weighted_combine

Case = tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


def _restore_cases(place: Callable[..., jax.ShapeDtypeStruct]) -> Iterator[Case]:
    for shape in restore_shapes.COMPILED:
        size = int(np.prod(shape))
        packed = place((bits.num_bytes(size),), jnp.uint8)
        for dtype in (jnp.float32, jnp.bfloat16):
            args = (place(shape, dtype), place(shape, jnp.float32), packed)
            yield f"{jnp.dtype(dtype)}{list(shape)}", masked_restore, args


def _pack_cases(place: Callable[..., jax.ShapeDtypeStruct]) -> Iterator[Case]:
    for shape, num_scales in pack_shapes.COMPILED:
        for dtype in (jnp.float32, jnp.bfloat16):
            args = (place(shape, dtype), place((num_scales,), jnp.float32))
            yield f"{jnp.dtype(dtype)}{list(shape)}x{num_scales}", tall_pack, args


def _gram_cases(place: Callable[..., jax.ShapeDtypeStruct]) -> Iterator[Case]:
    for shape in gram_shapes.COMPILED:
        for dtype in (jnp.float32, jnp.bfloat16):
            yield f"{jnp.dtype(dtype)}{list(shape)}", gram, (place(shape, dtype),)


def _combine_cases(place: Callable[..., jax.ShapeDtypeStruct]) -> Iterator[Case]:
    for shape, num_sums in combine_shapes.COMPILED:
        weights = place((num_sums, shape[0]), jnp.float32)
        for dtype in (jnp.float32, jnp.bfloat16):
            args = (place(shape, dtype), weights)
            yield f"{jnp.dtype(dtype)}{list(shape)}x{num_sums}", weighted_combine, args


def _compile(cases: Callable[..., Iterator[Case]], topology: Any) -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    out = {}
    for name, function, args in cases(place):
        run = functools.partial(function, implementation="pallas_tpu")
        out[name] = jax.jit(run).lower(*args).compile()
    return out


def list_kernels() -> dict[str, Callable[[Any], dict[str, Any]]]:
    """Kernels by name, each with a function that compiles it for a topology.

    Returns:
      Name -> `compile(topology)`, where `topology` is what
      `jax.experimental.topologies.get_topology_desc` returns. That call compiles the
      kernel for the shapes it is tested with, for one chip of the topology, without
      that chip, and returns the compiled programs by dtype and shape.

    >>> sorted(list_kernels())[:2]
    ['gram/pallas_tpu', 'masked_restore/pallas_tpu']
    """
    return {
        "gram/pallas_tpu": functools.partial(_compile, _gram_cases),
        "masked_restore/pallas_tpu": functools.partial(_compile, _restore_cases),
        "tall_pack/pallas_tpu": functools.partial(_compile, _pack_cases),
        "weighted_combine/pallas_tpu": functools.partial(_compile, _combine_cases),
    }
