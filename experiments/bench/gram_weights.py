"""Weights from a Gramian: every method, beside TorchJD on the same Gramian.

    python experiments/bench/gram_weights.py [--tasks 2,8,32,128] [--repeats 9]
        [--methods upgrad,mgda] [--out FILE.json]

The Gramians are those of random gradients in 1,000 dimensions that share a weak
direction ("mild"), and in T / 6 dimensions, where most tasks conflict and no task can
gain without another's loss ("hard"). Methods and peers take turns; reported are medians
and the fastest, since the machine may be shared. `call` is one call from Python, result
ready; JAX hands programs with loops to another thread, whose waking is most of it for
few tasks, so `call_here` is a call in a process with `jax_cpu_enable_async_dispatch`
off. `inside` is one of 20 solutions in a row inside one compiled program, as a
training step has it, without the call. The peers start from a Gramian too, in float32,
but for Nash-MTL, whose peer takes the gradients. `random` draws from a key (threefry)
inside the call, where the peer's generator is global.

`difference` is the length of the gap between the update and the peer's in float64, in
lengths of the longest gradient; where the two differ by design, `by_design` says why.
`error` is the same gap to an independent solution in float64.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mtl_jax import aggregation

# The peer's idle threads would keep the cores busy during our turns.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

try:
    import torch
    import torchjd.aggregation as peer
except ImportError:
    torch = peer = None

RESULTS = pathlib.Path(__file__).parent / "results" / "gram_weights.json"
GOALS = {8: 0.1, 128: 5.0}  # milliseconds a call
CHAIN = 20
RANDOM = {"grad_vac", "pcgrad", "random"}  # other draws, other values
BY_DESIGN = {
    "mgda": "exact here, where the peer's iteration stops early",
    "fair_grad": "solved to rounding here, by least squares there",
}
DEPENDENT = {  # where there are more tasks than dimensions
    "imtl_g": "gradients are dependent: the shortest solution here, a peer's choice",
    "nash_mtl": "no solution: weights are bounded by a ridge here, the peer gives up",
}


def ours() -> dict:
    """Name -> function of the Gramian."""
    w, key = aggregation.weights, jax.random.key(0)
    return {
        "aligned_mtl": w.aligned_mtl,
        "cagrad": w.cagrad,
        "config": w.config,
        "constant": lambda g: w.constant(g, jnp.ones(len(g))),
        "dual_proj": w.dual_proj,
        "fair_grad": w.fair_grad,
        "grad_vac": lambda g: w.grad_vac(g, key, jnp.full_like(g, 0.1)),
        "imtl_g": w.imtl_g,
        "krum": lambda g: w.krum(g, 0, squared=False),
        "mean": w.mean,
        "mgda": w.mgda,
        "modo": w.modo,
        "nash_mtl": w.nash_mtl,
        "pcgrad": lambda g: w.pcgrad(g, key),
        "random": lambda g: w.random(g, key),
        "sdm_grad": w.sdm_grad,
        "sum": w.sum,
        "upgrad": w.upgrad,
    }


def theirs(count: int) -> dict:
    """Name -> the peer's weighting, a function of the Gramian tensor."""
    if peer is None:
        return {}
    makers = {
        "aligned_mtl": peer.AlignedMTLWeighting,
        "cagrad": lambda: peer.CAGradWeighting(c=0.5),
        "dual_proj": peer.DualProjWeighting,
        "fair_grad": lambda: peer.FairGradWeighting(alpha=1.0),
        "grad_vac": peer.GradVacWeighting,
        "imtl_g": peer.IMTLGWeighting,
        "krum": lambda: peer.KrumWeighting(n_byzantine=0),
        "mean": peer.MeanWeighting,
        "mgda": peer.MGDAWeighting,
        "modo": peer.MoDoWeighting,
        "pcgrad": peer.PCGradWeighting,
        "random": peer.RandomWeighting,
        "sdm_grad": peer.SDMGradWeighting,
        "sum": peer.SumWeighting,
        "upgrad": peer.UPGradWeighting,
    }
    if importlib.util.find_spec("ecos") and count <= 32:  # Minutes above.
        makers["nash_mtl"] = lambda: peer.NashMTL(n_tasks=count)
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: no peer ({error})")
    return found


def exact(name: str, gram: np.ndarray) -> np.ndarray | None:
    """Weights by an independent solver in float64, for methods of one solution."""
    count, norms = len(gram), np.sqrt(np.diag(gram))
    if name == "mgda":
        values, vectors = np.linalg.eigh(gram / gram.max())
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        x, _ = scipy.optimize.nnls(
            np.vstack([root, np.ones(count)]), np.append(np.zeros(count), 1)
        )
        return x / x.sum()
    if name not in ("fair_grad", "nash_mtl"):
        return None
    ridge = 1e-6 + count * float(np.finfo(np.float32).eps)
    matrix = gram / norms / norms[:, None] + ridge * np.eye(count)
    x = np.ones(count)
    for _ in range(200):
        step = -np.linalg.solve(matrix + np.diag(x**-2), matrix @ x - 1 / x)
        x = x + min(1, 0.9 / max((-step / x).max(), 1e-30)) * step
    w = x / norms
    if name == "nash_mtl":
        w = w / max(np.sqrt(w @ gram @ w), 1)
    return w


def milliseconds(f) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - start)


def chained(weigh):
    """A program of `CHAIN` solutions, each waiting for the one before."""

    def step(gram, _):
        # Nothing is added, but the compiler cannot know.
        return gram + 0 * jnp.sum(weigh(gram)), None

    return jax.jit(lambda gram: jax.lax.scan(step, gram, length=CHAIN)[0])


def measure(grads, names, repeats: int) -> dict:
    """One row per method for one Jacobian [T, P]."""
    gram64 = grads.astype(np.float64) @ grads.T.astype(np.float64)
    gram = jnp.asarray(gram64, jnp.float32)
    peers = theirs(len(grads))
    tensor, matrix = None, None
    if torch is not None:
        tensor = torch.tensor(gram64, dtype=torch.float32)
        matrix = torch.tensor(grads, dtype=torch.float32)
    rows = {}
    for name in names:
        weigh = ours()[name]
        if name == "krum" and len(grads) < 3:
            continue
        call, chain = jax.jit(weigh), chained(weigh)
        runs = {
            "call": lambda call=call: call(gram).block_until_ready(),
            "inside": lambda chain=chain: chain(gram).block_until_ready(),
        }
        if name == "fair_grad" and len(grads) > 32 and grads.shape[1] < len(grads):
            peers.pop(name, None)  # Does not end within minutes.
        if name in peers:
            argument = matrix if name == "nash_mtl" else tensor
            runs["torchjd"] = lambda p=peers[name], a=argument: p(a)
        start = time.perf_counter()
        found = np.asarray(runs["call"](), np.float64)
        row = {"first_call": 1e3 * (time.perf_counter() - start)}
        longest = np.linalg.norm(grads, axis=1).max()
        if name in peers and name not in RANDOM:
            argument = grads if name == "nash_mtl" else gram64
            other = theirs(len(grads))[name](torch.tensor(argument)).numpy()
            other = other if name == "nash_mtl" else other @ grads
            gap = found @ grads - other
            row["difference"] = float(np.linalg.norm(gap) / longest)
            dependent = DEPENDENT if grads.shape[1] < len(grads) else {}
            reason = (BY_DESIGN | dependent).get(name)
            if reason:
                row["by_design"] = reason
        truth = exact(name, gram64)
        if truth is not None:
            row["error"] = float(np.linalg.norm((found - truth) @ grads) / longest)
        for run in runs.values():
            run()
        times = {run: [] for run in runs}
        for _ in range(repeats):
            for run, f in runs.items():
                times[run].append(milliseconds(f))
        for run, taken in times.items():
            share = CHAIN if run == "inside" else 1
            row[run] = statistics.median(taken) / share
            row[f"{run}_fastest"] = min(taken) / share
        if "torchjd" in row:
            row["speedup"] = row["torchjd"] / row["call"]
            row["speedup_fastest"] = row["torchjd_fastest"] / row["call_fastest"]
        rows[name] = row
        shown = {k: v for k, v in row.items() if not isinstance(v, str)}
        print(name, {k: float(f"{v:.3g}") for k, v in shown.items()}, flush=True)
    return rows


def calls(grads, names, repeats: int) -> dict:
    """Fastest call by name, milliseconds."""
    gram, found = jnp.asarray(grads @ grads.T, jnp.float32), {}
    for name in names:
        if name == "krum" and len(grads) < 3:
            continue
        weigh = jax.jit(ours()[name])
        weigh(gram).block_until_ready()
        runs = range(3 * repeats)
        found[name] = min(
            milliseconds(lambda f=weigh: f(gram).block_until_ready()) for _ in runs
        )
    return found


def jacobians(counts):
    """Task gradients by number and kind."""
    rng = np.random.default_rng(0)
    for count in counts:
        yield (
            f"{count} mild",
            rng.normal(size=(count, 1000)) + 0.1 * rng.normal(size=1000),
        )
        yield f"{count} hard", rng.normal(size=(count, max(count // 6, 2)))


def calls_here() -> dict:
    """The `calls` of this command in a process that does not hand them on."""
    command = [sys.executable, __file__, *sys.argv[1:], "--calls-here"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Times, compares, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="8,128")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default="")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--calls-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()

    names = [n for n in args.methods.split(",") if n] or sorted(ours())
    counts = list(map(int, args.tasks.split(",")))
    if args.calls_here:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        found = {k: calls(g, names, args.repeats) for k, g in jacobians(counts)}
        print(json.dumps(found))
        return
    here, tables = calls_here(), {}
    for kind, grads in jacobians(counts):
        print(f"-- {kind}")
        tables[kind] = measure(grads, names, args.repeats)
        for name, taken in here[kind].items():
            tables[kind][name]["call_here_fastest"] = taken
    late = {
        run: {
            f"{name}, {kind}": row[run]
            for kind, table in tables.items()
            for name, row in table.items()
            if row[run] > GOALS.get(int(kind.split()[0]), math.inf)
        }
        for run in ("call_fastest", "call_here_fastest", "inside_fastest")
    }
    result = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "torchjd": importlib.metadata.version("torchjd") if peer else None,
        "torch": torch.__version__ if torch else None,
        "torch_threads": torch.get_num_threads() if torch else None,
        "repeats": args.repeats,
        "goals_milliseconds": GOALS,
        "above_goal": late,
        "milliseconds": tables,
    }
    print("above the goal:", late)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
