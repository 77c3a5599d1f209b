"""Pulling one task out of a bank: bits read in the fused loop, or unpacked first.

python experiments/bench/masked_restore.py [--entries 8388608]

Compares, alternating in one process, `kernels.masked_restore` (the "xla"
implementation, jitted) with unpacking the mask to bool in one program and selecting
in another. Prints the bytes that each must move and the memory bandwidth of a plain
copy in the same run. Writes results/masked_restore.json beside this file.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from mtl_jax import kernels


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


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, default=1 << 23)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    n = args.entries
    keys = jax.random.split(jax.random.key(0), 3)
    base, delta = (jax.random.normal(k, (n,)) for k in keys[:2])
    packed = jax.jit(kernels.pack_bits)(jax.random.bernoulli(keys[2], 0.45, (n,)))

    fused = jax.jit(kernels.masked_restore)
    unpack = jax.jit(lambda p: kernels.unpack_bits(p, n))
    select = jax.jit(lambda b, d, m: b + jnp.where(m, d, 0.0))
    copy = jax.jit(lambda b: b + 1.0)
    seconds = median_times(
        {
            "fused": lambda: fused(base, delta, packed),
            "unpack_then_where": lambda: select(base, delta, unpack(packed)),
            "copy": lambda: copy(base),
        },
        args.repeats,
    )
    moved = {
        "fused": 12 * n + packed.size,
        "unpack_then_where": 12 * n + packed.size + 2 * n,
        "copy": 8 * n,
    }
    rate = {name: moved[name] / seconds[name] / 1e9 for name in seconds}
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "jax": jax.__version__,
        "entries": n,
        "median_seconds": seconds,
        "bytes_that_must_move": moved,
        "gigabytes_per_second": rate,
        "speedup": seconds["unpack_then_where"] / seconds["fused"],
        "fused_share_of_copy_bandwidth": rate["fused"] / rate["copy"],
    }
    print(json.dumps(result, indent=2))
    out = pathlib.Path(__file__).parent / "results" / "masked_restore.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
