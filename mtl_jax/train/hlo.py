"""Collectives in the text of a compiled program."""

import math
import re
from typing import NamedTuple

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?(?:-> (.*?) )?\{\s*$")
_FUSED_SCATTER = "all-reduce-scatter"  # A sum of which each device keeps its part.
_OP = re.compile(
    rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(_KINDS)})(?:-start)?\((.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALL = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^},]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


class Collective(NamedTuple):
    """One kind of collective on one shape.

    Attributes:
      kind: such as "all-gather".
      dtype: element type in the compiler's spelling, such as "bf16".
      shape: of the result on one device.
      groups: which devices talk to each other, in the compiler's spelling.
      in_loop: True inside a loop body, where every trip runs it again.
      count: how often it stands in the program.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: str
    in_loop: bool
    count: int

    @property
    def nbytes(self) -> int:
        """Size of one result on one device."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits.group()) if bits else 8
        return math.prod(self.shape) * width // 8


def collectives(text: str) -> tuple[Collective, ...]:
    """Collectives of `compiled.as_text()`, largest first.

    Args:
      text: of a compiled program.

    Returns:
      One entry per kind, type, shape, groups and place. A collective over a tuple of
      arrays gives one entry for each array; one that the compiler split into stages,
      which share a channel, counts once.
    """
    computation, result, calls, loops, channels = "", None, {}, set(), set()
    found: dict[tuple, int] = {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            computation, result = header.groups()
            continue
        for names in _CALL.findall(line):
            for name in names.split():
                calls.setdefault(computation, set()).add(name.strip("%,"))
        loops.update(_BODY.findall(line))
        op = _OP.match(line)
        channel = _CHANNEL.search(line)
        if op and not (channel and channel.group(1) in channels):
            channels.update(channel.groups() if channel else ())
            results, kind = op.groups()[:2]
            if kind == "all-reduce" and computation.startswith(_FUSED_SCATTER):
                results, kind = result or results, "reduce-scatter"
            for dtype, shape in _results(results, line, kind):
                groups = _GROUPS.search(line)
                key = (kind, dtype, shape, groups.group(1) if groups else "")
                found[key, computation] = found.get((key, computation), 0) + 1
    inside = _reachable(loops, calls)
    merged: dict[tuple, int] = {}
    for (key, where), count in found.items():
        full = (*key, where in inside)
        merged[full] = merged.get(full, 0) + count
    rows = [Collective._make((*key, count)) for key, count in merged.items()]
    return tuple(sorted(rows, key=lambda c: (-c.nbytes, c.kind, c.dtype, c.groups)))


def _results(kind_text: str, line: str, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    arrays = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(kind_text)
    ]
    if f"{kind}-start(" in line and kind != "all-reduce":
        arrays = [a for a in arrays if a != ("u32", ())]  # Semaphores.
        return arrays[len(arrays) // 2 :]  # (operands, results)
    return arrays


def _reachable(start: set[str], calls: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(calls.get(name, ()))
    return seen
