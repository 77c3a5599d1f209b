"""Gramians and weighted sums over tasks: XLA's forms on CPU, the TPU compiler's word.

python experiments/bench/gram_combine.py [--tasks 8] [--entries 2097152]

On this machine, alternating in one process, one leaf [T, n / 1024, 1024]: a dense
`dot_general`, the blocked form that `kernels.gram` takes by default, and its plain
definition; for weighted sums the written out form, which is the default, and the
definition. Each must read its operand once; the highest bandwidth of the same run, over
all forms, stands beside it. bfloat16 runs, too.

Then, ahead of time for one v5e chip (needs libtpu, which compiles but cannot run): for
XLA's forms and the Pallas kernels the temporaries, which instructions of the compiled
program write an array as large as the operand, and for XLA's forms the traffic that the
compiler itself counts. One read suffices where nothing that large is written and the
count is below 1.5 operands. Nothing here times a TPU.

Writes results/gram_combine.json beside this file.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import kernels, tree
from mtl_jax.kernels.gram import ref as gram_ref
from mtl_jax.kernels.weighted_combine import ref as combine_ref

CHIP = "v5e:2x2"
# [T, ...]: as a kernel, merged rows that fill whole tiles, rows that do not, flat.
LEAVES = ((8, 2048, 1024), (8, 12, 64, 768), (8, 5, 100, 200), (8, 1000003))
LEAVES += ((40, 1024, 768),)
_INSTRUCTION = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
_FREE = {"parameter", "bitcast", "get-tuple-element", "tuple"}


def median_times(calls, repeats):
    """Median seconds of each call; the variants take turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def dense(x):
    """One contraction, as XLA compiles it."""
    axes = tuple(range(1, x.ndim))
    dims = ((axes, axes), ((), ()))
    return jax.lax.dot_general(
        x, x, dims, precision="highest", preferred_element_type=jnp.float32
    )


def on_this_machine(tasks, entries, dtype, repeats):
    """Seconds, bytes and bandwidth of every form, and its error against float64."""
    x = jax.random.normal(jax.random.key(0), (tasks, entries // 1024, 1024), dtype)
    rows = jax.random.normal(jax.random.key(1), (4, tasks))
    one = rows[0]
    forms = {
        "gram dense": (dense, x),
        "gram blocked (default)": (kernels.gram, x),
        "gram definition": (gram_ref.gram, x),
        "combine written out (default)": (kernels.weighted_combine, x, one),
        "combine definition": (combine_ref.weighted_combine, x, rows[:1]),
        "combine 4 sums, written out (default)": (kernels.weighted_combine, x, rows),
        "combine 4 sums, definition": (combine_ref.weighted_combine, x, rows),
    }
    compiled = {name: (jax.jit(f), *args) for name, (f, *args) in forms.items()}
    seconds = median_times(
        {name: lambda f=f, a=a: f(*a) for name, (f, *a) in compiled.items()}, repeats
    )
    flat = np.asarray(x, np.float64).reshape(tasks, -1)
    wanted = flat @ flat.T
    out = {}
    for name, (f, *args) in compiled.items():
        written = 0 if name.startswith("gram") else x.nbytes // tasks
        written *= 4 if "4 sums" in name else 1
        program = f.lower(*args).compile()
        row = {
            "median_seconds": seconds[name],
            "bytes_that_must_move": x.nbytes + written,
            "gigabytes_per_second": (x.nbytes + written) / seconds[name] / 1e9,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
        if name.startswith("gram"):
            off = np.abs(np.asarray(f(*args), np.float64) - wanted).max()
            row["error_over_largest"] = off / np.abs(wanted).max()
        out[name] = row
    best = max(row["gigabytes_per_second"] for row in out.values())
    for row in out.values():
        row["share_of_best_bandwidth"] = row["gigabytes_per_second"] / best
    return out


def whole_writes(text, operand_bytes):
    """Instructions of the entry computation that write as much as the operand."""
    entry = text[text.index("\nENTRY") :]
    found = []
    for kind, dims, name in _INSTRUCTION.findall(entry):
        size = math.prod(int(d) for d in dims.split(",") if d) * _BYTES.get(kind, 4)
        if size >= operand_bytes and name not in _FREE:
            found.append(name)
    return found


def ahead_of_time():
    """Temporaries and whole writes of every form, compiled for one chip."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(CHIP, "tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(chip)

    def pallas(f):
        return lambda *args: f(*args, implementation="pallas_tpu")

    out = []
    for shape in LEAVES:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            w = jax.ShapeDtypeStruct(shape[:1], jnp.float32, sharding=place)
            size = math.prod(shape) * jnp.dtype(dtype).itemsize
            for name, f, args in (
                ("gram dense", dense, (x,)),
                ("gram pallas", pallas(kernels.gram), (x,)),
                ("combine written out", tree.combine, (x, w)),
                ("combine pallas", pallas(kernels.weighted_combine), (x, w)),
            ):
                # A function of its own: equal ones would share the first one's trace.
                program = jax.jit(lambda *a, f=f: f(*a)).lower(*args).compile()
                writes = whole_writes(program.as_text(), size)
                temp = program.memory_analysis().temp_size_in_bytes
                row = {
                    "form": name,
                    "leaf": list(shape),
                    "dtype": jnp.dtype(dtype).name,
                    "operand_bytes": size,
                    "temporary_bytes": temp,
                    "whole_writes": writes,
                }
                traffic = 1.0  # By the blocks; of a custom call XLA knows no traffic.
                if "pallas" not in name:
                    traffic = program.cost_analysis()["bytes accessed"] / size
                    row["bytes_accessed_over_operand"] = traffic
                row["one_read_suffices"] = not writes and traffic < 1.5
                print(json.dumps(row), flush=True)
                out.append(row)
    return out


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--entries", type=int, default=1 << 21)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "processors": os.cpu_count(),
        "jax": jax.__version__,
        "tasks": args.tasks,
        "entries": args.entries,
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        name = jnp.dtype(dtype).name
        rows = on_this_machine(args.tasks, args.entries, dtype, args.repeats)
        result[name] = rows
        print(name, json.dumps(rows, indent=2), flush=True)
    if importlib.util.find_spec("libtpu"):
        result["compiled_for"] = CHIP
        result["ahead_of_time"] = ahead_of_time()
    else:
        print("libtpu is not installed: nothing compiled ahead of time")
    out = pathlib.Path(__file__).parent / "results" / "gram_combine.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
