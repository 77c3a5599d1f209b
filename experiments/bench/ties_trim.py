"""Global TIES trim of 135 M parameters against sorting the flattened vector.

The trim keeps the largest 20% of one task vector, counted over the whole model, with
the leaves of a 30-layer decoder (hidden 576, vocabulary 49,152). The peer, timed in the
same process, sorts the flattened magnitudes and compares with the threshold. It sorts
with `numpy.sort` or `jax.numpy.sort`, whichever is faster on the first 2^21 entries.

    python experiments/bench/ties_trim.py [--repeats 5] [--out FILE.json]
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import merging, tree

DENSITY = 0.2
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576)]
LAYER += [(1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
SHAPES = [(49152, 576), *(LAYER * 30), (576,)]
RESULTS = pathlib.Path(__file__).parent / "results" / "ties_trim.json"


def resident() -> int:
    """Resident bytes of this process."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_above_start(f) -> int:
    """Most resident bytes above the start while `f` runs, sampled each millisecond."""
    start, peak, done = resident(), 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident() - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        kept = f()
    finally:
        done.set()
        sampler.join()
    del kept
    return peak


def time_once(f) -> float:
    """Wall seconds of one call, results ready."""
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def main() -> None:
    """Times, measures memory, checks agreement, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(s, np.float32) * np.float32(1e-3) for s in SHAPES]
    taus = {f"{i:03d}": jnp.asarray(x[None]) for i, x in enumerate(leaves)}
    flat = np.concatenate([x.ravel() for x in leaves])
    del leaves
    kept = int(DENSITY * flat.size)
    largest = max(int(np.prod(s)) for s in SHAPES) * 4

    def threshold():
        return tree.task_top_cutoffs(taus, kept, zero_ties=False)

    def trim():
        return merging.ties(taus, density=DENSITY)

    def sort_jax(magnitudes):
        return np.asarray(jnp.sort(magnitudes))

    sample = np.abs(flat[: 1 << 21])
    sort_jax(sample)
    sorts = {"numpy.sort": np.sort, "jax.numpy.sort": sort_jax}
    sample_seconds = {
        name: time_once(lambda f=f: f(sample)) for name, f in sorts.items()
    }
    peer = min(sample_seconds, key=sample_seconds.get)
    print("sample_seconds:", sample_seconds, flush=True)

    def sort_trim():
        magnitudes = np.abs(flat)
        return np.where(magnitudes >= sorts[peer](magnitudes)[-kept], flat, 0)

    ours = jax.block_until_ready(trim())
    got = np.concatenate([np.asarray(x).ravel() for x in ours.values()])
    del ours
    want = sort_trim()
    same = int(np.count_nonzero(got != want))
    exact = int(np.count_nonzero(got)) == kept
    del got, want
    extra = peak_above_start(lambda: jax.block_until_ready(threshold()))

    times = {"ours_threshold": [], "ours_ties": [], "sort": []}
    for _ in range(args.repeats):
        times["ours_threshold"].append(time_once(threshold))
        times["ours_ties"].append(time_once(trim))
        times["sort"].append(time_once(sort_trim))
        print({name: t[-1] for name, t in times.items()}, flush=True)
    medians = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "parameters": int(flat.size),
        "leaves": len(SHAPES),
        "density": DENSITY,
        "kept_exactly": exact,
        "entries_unlike_sort": same,
        "largest_leaf_bytes": largest,
        "threshold_peak_extra_bytes": extra,
        "memory_bound_bytes": 2 * largest + 2**20,
        "seconds": times,
        "median_seconds": medians,
        "sort_sample_seconds": sample_seconds,
        "faster_sort": peer,
        "speedup_threshold": medians["sort"] / medians["ours_threshold"],
        "speedup_ties": medians["sort"] / medians["ours_ties"],
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
