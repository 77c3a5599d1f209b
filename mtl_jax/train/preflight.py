"""Compiles the train step for a TPU that is not there, and says whether it fits."""

import contextlib
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import kernels
from mtl_jax.train import sharding
from mtl_jax.train.flops import count_flops
from mtl_jax.train.hlo import collectives
from mtl_jax.train.loop import Trainer
from mtl_jax.train.preflight_report import (
    FAILED,
    PreflightReport,
    largest_buffers,
    placement,
)
from mtl_jax.train.trainable import Trainable

# Nominal HBM of a chip in GiB; what a program may use is a little less.
CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
_SIZES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_FORMS = "v5e:4x4, v6e:2x2 (two sizes), v4:2x2x1, v5p:2x2x2, tpu7x:2x2x1 (three sizes)"
_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": _GIB, "T": 2**40}
_MEMORY = re.compile(
    r"\((?P<need>[\d.]+)(?P<nu>[KMGT]?)i?B?\) exceeds available HBM "
    r"\((?P<have>[\d.]+)(?P<hu>[KMGT]?)i?B?\)"
    r"|Used (?P<need2>[\d.]+)(?P<nu2>[KMGT]?)i?B? of "
    r"(?P<have2>[\d.]+)(?P<hu2>[KMGT]?)i?B? hbm"
)


def preflight(
    trainable: Trainable,
    batch_shapes: Any,
    *,
    topology: str = "v5e:4x4",
    mesh: Mapping[str, int] | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    with_kernels: bool = False,
) -> PreflightReport:
    """Compiles the very step the trainer runs, ahead of time, for a TPU topology.

    Nothing is allocated and no TPU is needed: parameters and batch are shapes, and
    `libtpu` compiles on any x86 Linux machine.

    Args:
      trainable: what would be trained.
      batch_shapes: tree of arrays or `jax.ShapeDtypeStruct`s with the global batch.
      topology: chip and layout, such as "v5e:4x4" or "v5p:2x2x2".
      mesh: sizes of the mesh axes, `{"data": -1, "model": 1}` by default.
      accumulate: as in `Trainer`.
      ema: as in `Trainer`.
      with_kernels: also compile every Pallas kernel, for one chip.

    Returns:
      The report. A step that does not fit is a report too, with `fits=False`.

    Raises:
      ValueError: when libtpu is not installed, when the topology has no such form, or
        when rules, mesh and batch do not fit each other.
    """
    placed = target_mesh(topology, mesh)
    trainer = Trainer(trainable, mesh=placed, accumulate=accumulate, ema=ema)
    size = sharding.check_batch(batch_shapes, placed, accumulate=accumulate)
    batch = jax.tree.map(lambda x: _abstract(x, placed), batch_shapes)
    state = trainer.abstract_state
    parts = {
        "parameters": state.params,
        "frozen": state.frozen,
        "optimizer": state.opt_state,
        "average": state.ema,
        "batch": batch,
    }
    return inspect(
        trainer.compiled_step,
        (state, batch),
        topology=topology,
        mesh=placed,
        batch_size=size,
        parts=parts,
        with_kernels=with_kernels,
    )


def target_mesh(topology: str, mesh: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of devices that are not there.

    Args:
      topology: see `preflight`.
      mesh: sizes of the axes, see `preflight`.

    Returns:
      A mesh for abstract arrays and ahead-of-time compilation.

    Raises:
      ValueError: as `preflight`.
    """
    axes: dict[str, Any] = {**(mesh or {})}
    return sharding.make_mesh(**axes, devices=_devices(topology))


def inspect(
    fn: Any,
    args: tuple[Any, ...],
    *,
    topology: str,
    mesh: Mesh,
    batch_size: int,
    parts: Mapping[str, Any],
    with_kernels: bool = False,
) -> PreflightReport:
    """Compiles any function for a topology; `preflight` of what is no train step.

    Args:
      fn: what `jax.jit` made.
      args: trees of `jax.ShapeDtypeStruct`s with shardings on `mesh`.
      topology: see `preflight`.
      mesh: of `target_mesh`; in context while the function is traced.
      batch_size: for the report.
      parts: groups of arrays, of the arguments or such as the function makes, whose
        placement is reported; those called parameters and frozen are counted.
      with_kernels: see `preflight`.

    Returns:
      The report.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        flops = count_flops(fn, *args)
        lowered = fn.lower(*args)
    devices = list(mesh.devices.flat)
    chip, _, sizes = topology.partition(":")
    chips = math.prod(int(n) for n in sizes.split("x"))
    nominal = CHIPS[chip] * _GIB * chips // len(devices) if chip in CHIPS else None
    leaves = jax.tree.leaves([parts.get("parameters"), parts.get("frozen")])
    known: dict[str, Any] = {
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "num_params": sum(math.prod(x.shape) for x in leaves),
        "flops": flops.total,
        "while_loops": flops.while_loops,
        "hbm_available": nominal,
        "placements": tuple(
            placement(name, part)
            for name, part in parts.items()
            if jax.tree.leaves(part)
        ),
        "kernels": _compile_kernels(devices) if with_kernels else {},
    }
    return PreflightReport(**(known | _compile(lowered)))


def _compile(lowered: Any) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler itself writes the program down: what it hands over cannot always
        # be read by the JAX that asked for it.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with _without_cache():
                compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            need, have = _needed(str(error))
            found = {"fits": False, "error": " ".join(str(error).split())[:600]}
            found |= {"hbm_needed": need} | ({"hbm_available": have} if have else {})
            return found | {"compile_seconds": time.perf_counter() - start}
        seconds = time.perf_counter() - start
        program = _written(folder, "after_optimizations")
        usage = _written(folder, "after_optimizations-memory-usage-report")
    memory: Any = compiled.memory_analysis()
    parts = {
        "hbm_arguments": memory.argument_size_in_bytes,
        "hbm_temporaries": memory.temp_size_in_bytes,
        "hbm_outputs": memory.output_size_in_bytes,
        "hbm_aliased": memory.alias_size_in_bytes,
    }
    return parts | {
        "fits": True,
        "hbm_needed": sum(parts.values()) - 2 * parts["hbm_aliased"],
        "collectives": collectives(program or compiled.as_text()),
        "buffers": largest_buffers(usage),
        "compile_seconds": seconds,
    }


def _written(folder: str, kind: str) -> str:
    """Text of the one file of a kind, or nothing."""
    found = list(pathlib.Path(folder).glob(f"*.{kind}.txt"))
    return found[0].read_text() if len(found) == 1 else ""


def _compile_kernels(devices: list[Any]) -> dict[str, str]:
    """Kernel -> "N shapes compiled", or the first line of what went wrong."""
    chip, found = types.SimpleNamespace(devices=devices), {}
    for name, compile_for in kernels.list_kernels().items():
        start = time.perf_counter()
        try:
            with _without_cache():
                cases = compile_for(chip)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            found[name] = f"{FAILED}: {str(error).splitlines()[0][:200]}"
            continue
        seconds = time.perf_counter() - start
        found[name] = f"{len(cases)} shapes compiled in {seconds:.1f} s"
    return found


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """JAX's cache takes a program for an absent device but cannot read it back."""
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _devices(topology: str) -> list[Any]:
    # Some others, such as sizes of 0, make the compiler end the process.
    match = re.fullmatch(r"(\w+):([1-9]\d{0,2}(?:x[1-9]\d{0,2}){1,2})", topology)
    sizes = [int(n) for n in match[2].split("x")] if match else []
    if not match or _SIZES.get(match[1], len(sizes)) != len(sizes):
        raise ValueError(
            f"preflight: found topology {topology!r}, wanted a form such as {_FORMS}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "preflight: the TPU compiler is not installed; "
            "pip install libtpu (or pip install 'mtl_jax[tpu]')"
        )
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # Ask no metadata server what machine this is.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # A compiler holds no chip: share it.
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {}
    if 1 in sizes[:2]:  # Smaller than a host of 2 x 2 chips.
        options["chips_per_host_bounds"] = (min(sizes[0], 2), min(sizes[1], 2), 1)
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "INVALID_ARGUMENT" not in text:
            raise ValueError(
                f"preflight: the TPU compiler did not start: {text}"
            ) from None
        raise ValueError(
            f"preflight: found topology {topology!r}, wanted a form such as {_FORMS}: "
            f"{text}"
        ) from None
    return list(found.devices)


def _abstract(x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec(sharding.DATA) if x.shape else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _needed(text: str) -> tuple[int | None, int | None]:
    """Bytes needed and available, as the compiler words them."""
    match = _MEMORY.search(text)
    if not match:
        return None, None
    found = match.groupdict()
    tail = "" if found["need"] else "2"
    need, have = (
        int(float(found[name + tail]) * _UNITS[found[unit + tail]])
        for name, unit in (("need", "nu"), ("have", "hu"))
    )
    return need, have
