"""What a program needs on a TPU that is not there, as numbers and as text."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mtl_jax.train.hlo import Collective

FAILED = "FAILED"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUFFER = re.compile(
    r"^[\d.\s]+\w+\(\s*\d+%\);\s*([\d.]+)(B|KiB|MiB|GiB);[\d\s]+;[\d\s]+;\s*(.*)$"
)


class Placement(NamedTuple):
    """How a group of arrays lies on the mesh. Sizes are bytes.

    Attributes:
      name: such as "parameters".
      whole: of all arrays.
      on_device: what one device holds of them.
      replicated: of the arrays that every device holds whole.
      axes: the largest share first, mesh axes by dimension, such as "(data,model)",
        and the bytes of the arrays that are split by them.
    """

    name: str
    whole: int
    on_device: int
    replicated: int
    axes: tuple[tuple[str, int], ...]


def placement(name: str, arrays: Any) -> Placement:
    """Adds up a tree of arrays, or of shapes with shardings.

    Args:
      name: of the group.
      arrays: leaves have a `NamedSharding`.

    Returns:
      `Placement`.
    """
    whole = own = replicated = 0
    axes: dict[str, int] = {}
    for x in jax.tree.leaves(arrays):
        size = math.prod(x.shape) * x.dtype.itemsize
        part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        whole, own = whole + size, own + part
        if part == size:
            replicated += size
        else:
            spec = _axes(x.sharding.spec)
            axes[spec] = axes.get(spec, 0) + size
    ranked = tuple(sorted(axes.items(), key=lambda pair: (-pair[1], pair[0])))
    return Placement(name, whole, own, replicated, ranked)


def _axes(spec):
    names = [
        "-" if s is None else "+".join((s,) if isinstance(s, str) else s) for s in spec
    ]
    while names[-1] == "-":
        names.pop()
    return f"({','.join(names)})"


def largest_buffers(text: str, limit: int = 6) -> tuple[tuple[int, str], ...]:
    """The largest temporaries of a program.

    Args:
      text: the compiler's report of memory usage.
      limit: how many.

    Returns:
      (bytes, what lies there one after the other), the largest first.
    """
    found = [m.groups() for m in map(_BUFFER.match, text.splitlines()) if m]
    rows = [(int(float(n) * _UNITS[unit]), shapes) for n, unit, shapes in found]
    return tuple(sorted(rows, key=lambda row: -row[0])[:limit])


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
      placements: how groups of arrays lie on the mesh.
      buffers: the largest temporaries, see `largest_buffers`.
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
    placements: tuple[Placement, ...] = ()
    buffers: tuple[tuple[int, str], ...] = ()
    compile_seconds: float = 0.0
    error: str | None = None
    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the step fits and every kernel compiled."""
        return self.fits and not any(
            text.startswith(FAILED) for text in self.kernels.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        plain = dataclasses.asdict(self)
        plain["collectives"] = [c._asdict() for c in self.collectives]
        plain["placements"] = [p._asdict() for p in self.placements]
        return plain

    def to_text(self) -> str:
        """The report as lines for a terminal."""
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [
            f"topology     {self.topology}: {self.num_devices} x {self.device_kind}, "
            f"mesh {axes}",
            f"model        {self.num_params:,} parameters, global batch "
            f"{self.batch_size:,}",
            f"verdict      {'FITS' if self.fits else 'DOES NOT FIT'}",
            *self._memory(),
            *map(_placement_line, self.placements),
        ]
        bound = " at least" if self.while_loops else ""
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

    def _memory(self):
        needed, available = _size(self.hbm_needed), _size(self.hbm_available)
        yield f"HBM a device {needed} needed of {available}"
        if not self.fits:
            return
        yield f"  arguments    {_size(self.hbm_arguments)}"
        largest = ", the largest:" if self.buffers else ""
        yield f"  temporaries  {_size(self.hbm_temporaries)}{largest}"
        for count, shapes in self.buffers:
            yield f"    {_size(count):>10s}  {_short_list(shapes)}"
        yield f"  outputs      {_size(self.hbm_outputs)}"
        yield f"  aliased      {_size(self.hbm_aliased)}"


def _placement_line(placed: Placement) -> str:
    parts = ", ".join(
        f"{size / max(placed.whole, 1):.1%} {axes}" for axes, size in placed.axes
    )
    return (
        f"{placed.name:12s} {_size(placed.whole)}, of which a device holds "
        f"{_size(placed.on_device)}: {parts + ', ' if parts else ''}"
        f"{_size(placed.replicated)} everywhere"
    )


def _short_list(shapes: str, limit: int = 60) -> str:
    """The first of a list of shapes, as many as fit."""
    if len(shapes) <= limit:
        return shapes
    return f"{shapes[:limit].rpartition(', ')[0] or shapes[:limit]}, ..."


def _short(groups: str, limit: int = 48) -> str:
    """Replica groups, or how many pairs a permutation has."""
    return groups if len(groups) <= limit else f"{groups.count('},') + 1} pairs"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    if count < 2**20:
        return f"{count / 2**10:.2f} KiB"
    if count < 2**30:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**30:.2f} GiB"
