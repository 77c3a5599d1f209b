"""Whole aggregations of task gradients [T, P] against reading them twice, and TorchJD.

Most methods read the gradients once for their Gramian and once for the combination, so
the yardstick is the time of two plain reads (`two_reads`: a sum over all elements,
doubled). `gram_and_combine` is the same with the products that a Gramian needs: what
any of the Gramian methods takes without its weights. Methods that track gradients from
step to step also read and write their state; `passes` counts all of it in units of
[T, P].

    python experiments/bench/aggregate_gradients.py [--tasks 16] [--parameters 1000000]
        [--repeats 9] [--methods config,krum] [--out FILE.json]

First the outputs are compared: ours in float32 with the peer's in float64, on the first
columns. Then, in each repeat, every method and its peer run once, one after the other.
Reported are the medians and the fastest, and ratios of the fastest: the machine may be
shared.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import aggregation, tree

try:
    import torch
    import torchjd.aggregation as peer
except ImportError:
    torch = peer = None

RESULTS = pathlib.Path(__file__).parent / "results" / "aggregate_gradients.json"
CHECKED = 20_000  # columns
TOLERANCES = {"mgda": 5e-2, "nash_mtl": 1e-2}  # where the peer stops early
TOLERANCE = 1e-3
RANDOM = {"grad_drop", "random", "pcgrad", "grad_vac"}  # other draws, other values


def ours(count: int) -> dict:
    """Name -> (aggregator, reads and writes of [T, P] that the method cannot avoid)."""
    agg = aggregation
    return {
        "mean": (agg.mean(), 1),
        "random": (agg.random(), 1),
        "pcgrad": (agg.pcgrad(), 2),
        "mgda": (agg.mgda(), 2),
        "upgrad": (agg.upgrad(), 2),
        "dual_proj": (agg.dual_proj(), 2),
        "cagrad": (agg.cagrad(), 2),
        "imtl_g": (agg.imtl_g(), 2),
        "aligned_mtl": (agg.aligned_mtl(), 2),
        "nash_mtl": (agg.nash_mtl(count), 2),
        "fair_grad": (agg.fair_grad(), 2),
        "krum": (agg.krum(faulty=1, squared=False), 2),
        "config": (agg.config(), 2),
        "trimmed_mean": (agg.trimmed_mean(trim=1), 1),
        "grad_drop": (agg.grad_drop(), 1),
        "excess_mtl": (agg.excess_mtl(count), 4),
        "moco": (agg.moco(count), 6),
        "db_mtl": (agg.db_mtl(count), 5),
        "every_10_config": (agg.every_k(agg.config(), count, 10), 1),
        "per_leaf_config": (agg.per_leaf(agg.config()), 2),
    }


def theirs(count: int) -> dict:
    """The peer's aggregators by our names, but for missing dependencies."""
    if peer is None:
        return {}
    makers = {
        "mean": lambda: peer.Mean(),
        "random": lambda: peer.Random(),
        "pcgrad": lambda: peer.PCGrad(),
        "mgda": lambda: peer.MGDA(),
        "upgrad": lambda: peer.UPGrad(),
        "dual_proj": lambda: peer.DualProj(),
        "cagrad": lambda: peer.CAGrad(c=0.5),
        "imtl_g": lambda: peer.IMTLG(),
        "aligned_mtl": lambda: peer.AlignedMTL(),
        "nash_mtl": lambda: peer.NashMTL(n_tasks=count),
        "fair_grad": lambda: peer.FairGrad(alpha=1.0),
        "krum": lambda: peer.Krum(n_byzantine=1),
        "config": lambda: peer.ConFIG(),
        "trimmed_mean": lambda: peer.TrimmedMean(trim_number=1),
        "grad_drop": lambda: peer.GradDrop(),
        "excess_mtl": lambda: peer.ExcessMTL(robust_step_size=1e-2, n_warmup_steps=1),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, AttributeError, TypeError) as error:
            print(f"{name}: no peer ({error})")
    return found


def seconds(f) -> float:
    """Wall time of one call, results ready."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def difference(tx, module, matrix) -> float:
    """Between our update and the peer's in float64, over the largest entry."""
    want = module(torch.from_numpy(matrix).double()).numpy()
    state = tx.init({"w": jnp.zeros(matrix.shape[1])})
    found, _ = jax.jit(tx.update)({"w": jnp.asarray(matrix)}, state)
    return float(np.abs(np.asarray(found["w"]) - want).max() / np.abs(want).max())


class Stepper:
    """An aggregator under jit that carries (and donates) its state."""

    def __init__(self, tx, params, grads, losses):
        self.step = jax.jit(
            lambda g, s: tx.update(g, s, None, losses=losses), donate_argnums=1
        )
        self.state = tx.init(params)
        self.grads = grads
        self.out = None

    def __call__(self):
        """One update."""
        self.out, self.state = jax.block_until_ready(self.step(self.grads, self.state))


def main() -> None:
    """Checks agreement, times, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default="")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.tasks, args.parameters)
    matrix = rng.standard_normal(shape, np.float32)
    matrix += 0.3 * rng.standard_normal(args.parameters, np.float32)
    grads = {"w": jnp.asarray(matrix)}
    params = {"w": jnp.zeros(args.parameters)}
    losses = jnp.ones(args.tasks)
    wanted = set(filter(None, args.methods.split(",")))
    methods = {
        name: value
        for name, value in ours(args.tasks).items()
        if not wanted or name in wanted
    }
    peers = {k: v for k, v in theirs(args.tasks).items() if k in methods}
    tensor = None if torch is None else torch.from_numpy(matrix)

    total = jax.jit(lambda g: jnp.sum(g["w"]))
    gram = jax.jit(tree.gram)
    both = jax.jit(lambda g: tree.combine(g, jnp.diag(tree.gram(g))))
    runs = {
        "one_read": lambda: total(grads).block_until_ready(),
        "gram": lambda: gram(grads).block_until_ready(),
        "gram_and_combine": lambda: jax.block_until_ready(both(grads)),
    }
    steppers = {n: Stepper(tx, params, grads, losses) for n, (tx, _) in methods.items()}
    runs |= steppers
    runs |= {f"torchjd.{n}": lambda a=a: a(tensor) for n, a in peers.items()}

    errors = {}
    for name in set(peers) - RANDOM:
        module = theirs(args.tasks)[name]
        errors[name] = difference(methods[name][0], module, matrix[:, :CHECKED])
        if errors[name] > TOLERANCES.get(name, TOLERANCE):
            raise SystemExit(f"{name}: {errors[name]} from the peer's update")
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
            # What all others are divided by is measured beside each of them.
            for base in ("one_read", "gram_and_combine"):
                times[base].append(seconds(runs[base]))

    fastest = {name: min(t) for name, t in times.items()}
    two_reads = 2 * fastest["one_read"]
    rows = {}
    for name, (_, passes) in methods.items():
        rows[name] = {
            "milliseconds_median": 1e3 * statistics.median(times[name]),
            "milliseconds_fastest": 1e3 * fastest[name],
            "passes": passes,
            "over_two_reads": fastest[name] / two_reads,
            "over_its_passes": fastest[name] / (passes * fastest["one_read"]),
            "over_gram_and_combine": fastest[name] / fastest["gram_and_combine"],
        }
        if name in peers:
            theirs_fastest = fastest[f"torchjd.{name}"]
            rows[name] |= {
                "torchjd_milliseconds_fastest": 1e3 * theirs_fastest,
                "speedup_over_torchjd": theirs_fastest / fastest[name],
            }
        if name in errors:
            rows[name]["relative_difference"] = errors[name]
    result = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "torchjd": importlib.metadata.version("torchjd") if peer else None,
        "torch": torch.__version__ if torch else None,
        "torch_threads": torch.get_num_threads() if torch else None,
        "tasks": args.tasks,
        "parameters": args.parameters,
        "repeats": args.repeats,
        "milliseconds_two_reads": 1e3 * two_reads,
        "milliseconds_gram": 1e3 * fastest["gram"],
        "milliseconds_gram_and_combine": 1e3 * fastest["gram_and_combine"],
        "methods": rows,
    }
    for name, value in result.items():
        if name != "methods":
            print(f"{name}: {value}")
    for name, row in rows.items():
        print(name, {k: float(f"{v:.3g}") for k, v in row.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
