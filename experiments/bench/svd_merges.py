"""Merges by singular vectors: seconds, and the error of their quick options.

Eight tasks of one 1024 x 1024 matrix with random singular vectors and singular values
exp(-i / 80) or i^-0.7. Every option is compared with the exact one of its rule in
float64 (NumPy), relative in the Frobenius norm; the exact one in float32 too. The goal
is 0.6 s. Where other jobs run, threads of OpenBLAS that wait for each other take more
time than they save: OPENBLAS_NUM_THREADS=1.

    python experiments/bench/svd_merges.py [--repeats 5] [--out FILE.json]
"""

import argparse
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import merging

GOAL = 0.6
RESULTS = pathlib.Path(__file__).parent / "results" / "svd_merges.json"
DECAYS = {"exp(-i / 80)": lambda i: np.exp(-i / 80), "i^-0.7": lambda i: i**-0.7}
EXACT, QUICK, SKETCH = {}, {"svd": "gram", "polar": "gram"}, {"svd": "sketch"}
OPTIONS = {
    "iso_c": (EXACT, {"polar": "gram"}, {"polar": "newton"}),
    "iso_cts": (EXACT, QUICK, SKETCH | {"polar": "gram"}),
    "tsv_merge": (EXACT, QUICK, SKETCH | {"polar": "gram"}),
    "knots": (EXACT, {"svd": "gram"}),
}


def tasks(decay, count: int, size: int) -> np.ndarray:
    """float64 [count, size, size]."""
    random = np.random.default_rng(0)

    def basis():
        return np.linalg.qr(random.standard_normal((size, size)))[0]

    values = decay(np.arange(1.0, size + 1))
    return np.stack([(basis() * values) @ basis().T for _ in range(count)])


def polar(x: np.ndarray) -> np.ndarray:
    """The nearest isometry."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def wanted(name: str, x: np.ndarray) -> np.ndarray | None:
    """The result of a rule in float64; None where its definition needs our trim."""
    count, size = x.shape[:2]
    total = x.sum(0)
    if name == "iso_c":
        return polar(total) * np.linalg.svd(total, compute_uv=False).mean()
    if name == "tsv_merge":
        parts = [np.linalg.svd(matrix) for matrix in x]
        rank = size // count
        left = polar(np.concatenate([u[:, :rank] for u, _, _ in parts], 1))
        right = polar(np.concatenate([vt[:rank] for _, _, vt in parts], 0))
        return left * np.concatenate([s[:rank] for _, s, _ in parts]) @ right
    if name == "iso_cts":
        # Layout "in_out": outputs are columns.
        outer, values, inner = np.linalg.svd(total.T)
        own = round((size - round(0.8 * size)) / count)
        common = size - count * own
        top = outer[:, :common]
        parts = [np.linalg.svd(m.T - top @ (top.T @ m.T)) for m in x]
        left = np.concatenate([*(u[:, :own] for u, _, _ in parts), top], 1)
        right = np.concatenate([*(v[:own] for _, _, v in parts), inner[:common]], 0)
        mean = np.concatenate([*(s[:own] for _, s, _ in parts), values[:common]]).mean()
        return (mean * polar(left) @ polar(right)).T
    return None


def measure(name: str, options: dict, x: jax.Array, repeats: int):
    """Result, wall seconds and processor seconds, the fastest of a few."""
    rule = getattr(merging, name)
    step = jax.jit(lambda w: rule({"w": w}, check_finite=False, **options)["w"])
    found = jax.block_until_ready(step(x))
    walls, used = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(x))
        walls.append(time.perf_counter() - wall)
        used.append(time.process_time() - processor)
    return np.asarray(found, np.float64), min(walls), min(used)


def main() -> None:
    """Times, prints and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rules", nargs="+", choices=sorted(OPTIONS), default=None)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for decay, function in DECAYS.items():
        x = tasks(function, args.tasks, args.size)
        for name in args.rules or OPTIONS:
            reference = wanted(name, x)
            for options in OPTIONS[name]:
                repeats = args.repeats if options else 1
                found, wall, used = measure(
                    name, options, jnp.asarray(x, "f4"), repeats
                )
                reference = found if reference is None else reference
                gap = np.linalg.norm(found - reference) / np.linalg.norm(reference)
                rows.append(
                    {
                        "rule": name,
                        "options": options,
                        "singular_values": decay,
                        "seconds": wall,
                        "processor_seconds": used,
                        "error": float(gap),
                        "meets_goal": wall <= GOAL,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "tasks": args.tasks,
        "size": args.size,
        "repeats": args.repeats,
        "goal_seconds": GOAL,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
