"""Cost of a whole training step with UPGrad, as a ratio to the summed loss.

python experiments/bench/per_task_step.py [--width 512 --batch 128]

A shared perceptron of two layers and T linear heads, cross-entropy, Adam. Times the
trainer's own step for every engine, and TorchJD's where it is installed, taking turns
in one process, each on one thread; each ratio is to the summed loss of the same
library. The goal of an exact engine is (1 + 2 T) / 3: one forward pass, and T backward
passes of twice its cost, against one of each. Writes results/per_task_step.json beside
this file.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time

# One thread for both libraries; read when they are imported.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from mtl_jax import aggregation, train, tree  # noqa: E402

TASKS = (3, 10, 40)
CLASSES = 10
FEATURES_GOAL = 1.5
EXACT = ("map", "vmap", "gramian")


def problem(num_tasks, width, seed=0):
    """(init, SplitLoss, the same loss without copies)."""

    def init(key):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = ((width, width), (width, width), (num_tasks, width, CLASSES))
        names = ("first", "second", "heads")
        return {
            name: jax.random.normal(k, shape) / width**0.5
            for name, k, shape in zip(names, keys, shapes, strict=True)
        }

    def encode(params, batch, key):
        return jax.nn.relu(jax.nn.relu(batch["x"] @ params["first"]) @ params["second"])

    def losses(logits, batch):
        xent = optax.softmax_cross_entropy_with_integer_labels
        return xent(logits, batch["y"].T).mean(1), {}

    def heads(params, copies, batch, key):
        return losses(jnp.einsum("tbd,tdc->tbc", copies, params["heads"]), batch)

    def plain(params, batch, key):
        # All heads in one product, which is what the summed loss does best.
        wide = params["heads"].swapaxes(0, 1).reshape(width, -1)
        logits = encode(params, batch, key) @ wide
        logits = logits.reshape(-1, num_tasks, CLASSES).swapaxes(0, 1)
        return losses(logits, batch)

    split = aggregation.SplitLoss(encode=encode, heads=heads, num_tasks=num_tasks)
    return init, split, plain


def rows(num_tasks, width, batch):
    """One batch."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(batch, width)).astype(np.float32),
        "y": rng.integers(0, CLASSES, (batch, num_tasks)).astype(np.int32),
    }


def trainers(num_tasks, width, mesh):
    """Name -> trainer, the summed loss first."""
    init, split, plain = problem(num_tasks, width)

    def summed(params, batch, key):
        losses, metrics = plain(params, batch, key)
        return losses.sum(), metrics

    common = {"init": init, "tx": optax.adam(1e-4)}
    found = {"summed": train.Trainable(loss_fn=summed, **common)}
    for engine in (*EXACT, "features"):
        features = engine == "features"
        found[engine] = train.Trainable(
            loss_fn=split if features else plain,
            aggregator=aggregation.upgrad(),
            shared=(".*",) if features else ("first", "second"),
            grads=engine,
            **common,
        )
    return {name: train.Trainer(t, mesh=mesh) for name, t in found.items()}


class JaxStep:
    """One step of a trainer, again and again."""

    def __init__(self, trainer, batch):
        self.batch = train.shard_batch(trainer.mesh, batch)
        self.state = trainer.init_state()
        start = time.perf_counter()
        lowered = trainer.compiled_step.lower(self.state, self.batch)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self):
        """Runs and waits."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return metrics


class TorchStep:
    """The same in TorchJD, or with the summed loss in torch."""

    def __init__(self, num_tasks, width, batch, surgery):
        import torch
        from torchjd.aggregation import UPGrad

        self.torch, self.surgery = torch, surgery
        params = problem(num_tasks, width)[0](None)
        params = {k: torch.tensor(np.asarray(v)) for k, v in params.items()}
        self.shared = [params["first"], params["second"]]
        self.heads = [head.clone() for head in params["heads"]]
        for each in (*self.shared, *self.heads):
            each.requires_grad_(True)
        self.optimizer = torch.optim.Adam([*self.shared, *self.heads], lr=1e-4)
        self.x = torch.tensor(batch["x"])
        self.labels = torch.tensor(batch["y"]).long().T.contiguous()
        self.aggregator = UPGrad()

    def __call__(self):
        """Runs one step."""
        torch = self.torch
        first, second = self.shared
        z = torch.relu(torch.relu(self.x @ first) @ second)
        cross_entropy = torch.nn.functional.cross_entropy
        losses = [
            cross_entropy(z @ head, labels)
            for head, labels in zip(self.heads, self.labels, strict=True)
        ]
        if self.surgery:
            from torchjd.autojac import jac_to_grad, mtl_backward

            mtl_backward(
                losses,
                features=z,
                tasks_params=[[head] for head in self.heads],
                shared_params=self.shared,
            )
            jac_to_grad(self.shared, self.aggregator)
        else:
            sum(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(steps, repeats):
    """Name -> seconds of every repeat; the variants take turns."""
    times = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, over):
    """Median, smallest and largest of the ratios of the same repeat."""
    found = sorted(a / b for a, b in zip(times, over, strict=True))
    return {
        "median": statistics.median(found),
        "smallest": found[0],
        "largest": found[-1],
    }


def check(steps):
    """Refuses to time engines that do not make the same first two steps."""
    for _ in range(2):
        for name in EXACT:
            steps[name]()
    wanted = steps["map"].state.params
    for name in EXACT:
        for a, b in zip(
            jax.tree.leaves(wanted),
            jax.tree.leaves(steps[name].state.params),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)


def measure(num_tasks, width, batch, repeats, with_torch):
    """One row of the result."""
    mesh = train.make_mesh(devices=jax.devices()[:1])
    data = rows(num_tasks, width, batch)
    found = trainers(num_tasks, width, mesh)
    steps = {name: JaxStep(t, data) for name, t in found.items()}
    check(steps)
    temporaries = {
        name: step.compiled.memory_analysis().temp_size_in_bytes
        for name, step in steps.items()
    }
    compile_seconds = {name: step.compile_seconds for name, step in steps.items()}
    every = dict(steps)
    if with_torch:
        every["torch summed"] = TorchStep(num_tasks, width, data, False)
        every["torchjd"] = TorchStep(num_tasks, width, data, True)
    times = timed(every, repeats)
    over = {name: times["summed"] for name in (*EXACT, "features")}
    if with_torch:
        over["torchjd"] = times["torch summed"]
    result = {
        "tasks": num_tasks,
        "goal_exact": (1 + 2 * num_tasks) / 3,
        "goal_features": FEATURES_GOAL,
        "ratio_to_summed": {n: ratio(times[n], over[n]) for n in over},
        "median_seconds": {n: statistics.median(v) for n, v in times.items()},
        "temp_bytes": temporaries,
        "compile_seconds": compile_seconds,
        "parameters": tree.size(steps["summed"].state.params),
    }
    if with_torch:
        result["ratio_to_torchjd"] = {
            n: ratio(times[n], times["torchjd"]) for n in (*EXACT, "features")
        }
    return result


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    with_torch = importlib.util.find_spec("torchjd") is not None
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": {k: os.environ[k] for k in ("XLA_FLAGS", "OMP_NUM_THREADS")},
        "jax": jax.__version__,
        "sizes": vars(args),
        "method": "upgrad",
        "rows": [],
    }
    out = pathlib.Path(__file__).parent / "results" / "per_task_step.json"
    out.parent.mkdir(exist_ok=True)
    for num_tasks in TASKS:
        row = measure(num_tasks, args.width, args.batch, args.repeats, with_torch)
        print(json.dumps(row, indent=2), flush=True)
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
