"""Compiles the train step for a TPU that is not there, and says whether it fits."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import kernels
from mtl_jax.train import sharding
from mtl_jax.train.flops import count_flops
from mtl_jax.train.hlo import Collective, collectives
from mtl_jax.train.loop import Trainer
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

_FAILED = "FAILED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What the compiler said. Sizes are bytes on one device.

    Attributes:
      topology: as asked for.
      device_kind: the compiler's name of the device.
      num_devices: devices in the topology.
      mesh: sizes of the mesh axes by name.
      batch_size: global number of examples per step.
      num_params: parameters, frozen ones included.
      fits: True when the compiler produced a program.
      hbm_arguments: state and batch going in.
      hbm_temporaries: what the step needs besides.
      hbm_outputs: state and metrics coming out.
      hbm_aliased: part of the outputs that reuses the memory of arguments.
      hbm_needed: arguments + temporaries + outputs - aliased, a cautious total; where
        the program does not fit, what the compiler said it needs.
      hbm_available: what the compiler said there is; else the nominal size, or None.
      flops: matrix products and convolutions of one step, over all devices.
      while_loops: loops of unknown length, counted once in `flops`.
      collectives: what the devices send each other; only those a loop runs again are
        marked, not how often.
      compile_seconds: wall-clock time of the compiler on this machine.
      error: the compiler's message when the step does not fit.
      kernels: name -> what became of compiling it, for every Pallas kernel.
    """

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    num_params: int
    fits: bool
    hbm_arguments: int | None = None
    hbm_temporaries: int | None = None
    hbm_outputs: int | None = None
    hbm_aliased: int | None = None
    hbm_needed: int | None = None
    hbm_available: int | None = None
    flops: int = 0
    while_loops: int = 0
    collectives: tuple[Collective, ...] = ()
    compile_seconds: float = 0.0
    error: str | None = None
    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the step fits and every kernel compiled."""
        return self.fits and not any(
            text.startswith(_FAILED) for text in self.kernels.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        plain = dataclasses.asdict(self)
        plain["collectives"] = [c._asdict() for c in self.collectives]
        return plain

    def to_text(self) -> str:
        """The report as lines for a terminal."""
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        bound = " at least" if self.while_loops else ""
        lines = [
            f"topology     {self.topology}: {self.num_devices} x {self.device_kind}, "
            f"mesh {axes}",
            f"model        {self.num_params:,} parameters, global batch "
            f"{self.batch_size:,}",
            f"verdict      {'FITS' if self.fits else 'DOES NOT FIT'}",
            f"HBM a device {_size(self.hbm_needed)} needed of "
            f"{_size(self.hbm_available)}",
        ]
        if self.fits:
            lines += [
                f"  arguments    {_size(self.hbm_arguments)}",
                f"  temporaries  {_size(self.hbm_temporaries)}",
                f"  outputs      {_size(self.hbm_outputs)}",
                f"  aliased      {_size(self.hbm_aliased)}",
            ]
        lines += [
            f"FLOPs a step{bound} {self.flops:,} "
            f"({self.flops / self.num_devices / 1e12:.4g} TFLOP a device)",
            f"compiled in  {self.compile_seconds:.1f} s",
        ]
        if self.collectives:
            lines.append("collectives  (a loop runs those marked * once a trip)")
        for c in self.collectives:
            shape = f"{c.dtype}{list(c.shape)}".replace(" ", "")
            star = "*" if c.in_loop else " "
            lines.append(
                f"  {star}{c.count:4d} x {c.kind:20s} {shape:28s} {_short(c.groups)}"
            )
        lines += [f"kernel       {name}: {text}" for name, text in self.kernels.items()]
        if self.error:
            lines.append(f"compiler     {self.error}")
        return "\n".join(lines)


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
    devices = _devices(topology)
    axes: dict[str, Any] = {**(mesh or {})}
    placed = sharding.make_mesh(**axes, devices=devices)
    trainer = Trainer(trainable, mesh=placed, accumulate=accumulate, ema=ema)
    size = sharding.check_batch(batch_shapes, placed, accumulate=accumulate)
    batch = jax.tree.map(lambda x: _abstract(x, placed), batch_shapes)
    state = trainer.abstract_state
    flops = count_flops(trainer.compiled_step, state, batch)
    leaves = jax.tree.leaves((state.params, state.frozen))
    chip = topology.split(":")[0]
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    nominal = CHIPS[chip] * _GIB * chips // len(devices) if chip in CHIPS else None
    known: dict[str, Any] = {
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "mesh": dict(placed.shape),
        "batch_size": size,
        "num_params": sum(math.prod(x.shape) for x in leaves),
        "flops": flops.total,
        "while_loops": flops.while_loops,
        "hbm_available": nominal,
        "kernels": _compile_kernels(devices) if with_kernels else {},
    }
    return PreflightReport(**(known | _compile(trainer, batch)))


def _compile(trainer: Trainer, batch: Any) -> dict[str, Any]:
    lowered = trainer.compiled_step.lower(trainer.abstract_state, batch)
    start = time.perf_counter()
    try:
        with _without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        need, have = _needed(str(error))
        found = {"fits": False, "error": " ".join(str(error).split())[:600]}
        found |= {"hbm_needed": need} | ({"hbm_available": have} if have else {})
        return found | {"compile_seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
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
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": seconds,
    }


def _compile_kernels(devices: list[Any]) -> dict[str, str]:
    """Kernel -> "N shapes compiled", or the first line of what went wrong."""
    chip, found = types.SimpleNamespace(devices=devices), {}
    for name, compile_for in kernels.list_kernels().items():
        start = time.perf_counter()
        try:
            with _without_cache():
                cases = compile_for(chip)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            found[name] = f"{_FAILED}: {str(error).splitlines()[0][:200]}"
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


def _short(groups: str, limit: int = 48) -> str:
    """Replica groups, or how many pairs a permutation has."""
    return groups if len(groups) <= limit else f"{groups.count('},') + 1} pairs"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    if count < 2**20:
        return f"{count / 2**10:.2f} KiB"
    if count < _GIB:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / _GIB:.2f} GiB"
