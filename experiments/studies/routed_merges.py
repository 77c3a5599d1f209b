"""Routed merges on the synthetic zero-shot world: SMILE, WEMoE and Twin-Merging.

python experiments/studies/routed_merges.py --seeds 0 1 2 --out experiments/results

No router is told the task. SMILE sees no data; WEMoE learns from the entropy of
predictions on unlabelled test inputs; the router of Twin-Merging from training inputs
and the names of their tasks. Writes OUT/routed_merges.json and prints Markdown.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import losses, merging, models, report, routing, tree, zoo
from mtl_jax.models import heads
from mtl_jax.zoo import presets

_MLP = models.Mlp(features=(192, 192, 32))


def apply_fn(params, x):
    """Features of the world's encoder, [B, 32]."""
    return _MLP.apply({"params": params}, x)


class World:
    """One seed: base, task vectors, rows and frozen heads."""

    def __init__(self, seed: int, progress: report.Progress):
        suite, experts = presets.world()
        options = {**suite["options"], "seed": seed}
        encoder, tasks = zoo.world(**options, progress=progress)
        opened = zoo.open_zoo(
            encoder, tasks, zoo.Settings(**experts), progress=progress
        )
        self.base, self.count = opened.base, len(tasks)
        self.taus = merging.task_vectors(opened.base, opened.experts["standard"])
        self.prototypes = jnp.stack([task.head["prototypes"] for task in tasks])
        self.inputs = {
            split: jnp.stack([jnp.asarray(t.splits[split]["inputs"]) for t in tasks])
            for split in ("train", "test")
        }
        self.labels = jnp.stack([jnp.asarray(t.splits["test"]["label"]) for t in tasks])
        self.expert = np.array(
            [
                self.accuracy(functools.partial(apply_fn, expert))[t]
                for t, expert in enumerate(opened.experts["standard"])
            ]
        )

    def logits(self, features, prototypes):
        """[B, C] of one head."""
        return 16.0 * heads.l2_normalize(features) @ prototypes.T

    def accuracy(self, features_fn) -> np.ndarray:
        """[T] on test rows."""

        @jax.jit
        def one(x, prototypes, labels):
            found = jnp.argmax(self.logits(features_fn(x), prototypes), -1)
            return (found == labels).mean()

        rows = zip(self.inputs["test"], self.prototypes, self.labels, strict=True)
        return np.array([float(one(*row)) for row in rows])

    def normalised(self, features_fn) -> float:
        """Mean over tasks of accuracy over that of the task's expert."""
        return float((self.accuracy(features_fn) / self.expert).mean())


def smile(world: World, rank: int, gate_rank: int, top_k: int) -> float:
    """Experts and gates from singular vectors, biases included; nothing is learned."""
    experts = routing.smile_experts(world.taus, rank=rank, gate_rank=gate_rank)
    return world.normalised(
        lambda x: models.apply_smile(_MLP, world.base, experts, x, top_k=top_k)
    )


def we_moe(world: World, steps: int) -> dict[str, float]:
    """One router per layer, before and after learning from entropy."""
    widths = {"layers_0": 48, "layers_1": 192, "layers_2": 192}
    groups = {name: f"^{name}/" for name in widths}
    model = routing.upscale(world.base, world.taus, groups, static_scale=0.3)
    routers = {
        name: routing.init_router(
            jax.random.key(i), width, world.count, hidden=32, bias=0.3
        )
        for i, (name, width) in enumerate(widths.items())
    }

    def loss_fn(routers, batch, prototypes, model):
        features = models.apply_routed(_MLP, routers, model, batch)
        return losses.softmax_entropy(world.logits(features, prototypes)).mean()

    rows = np.random.default_rng(0).integers(0, 1000, (steps, world.count, 16))
    batches = world.inputs["test"][jnp.arange(world.count)[None, :, None], rows]
    run = merging.learner(lambda routers, _: routers, loss_fn, optax.adam(1e-3))
    found = run(routers, batches, world.prototypes, args=model)

    def score(routers):
        return world.normalised(lambda x: models.apply_routed(_MLP, routers, model, x))

    return {
        "WEMoE, before": score(routers),
        f"WEMoE, {steps} steps": score(found.variables),
    }


def twin(world: World, rank: int | None) -> float:
    """A router on features of the shared model, learned as a classifier of tasks."""
    model = routing.twin(world.taus, scale=0.3, rank=rank)
    shared = tree.add_scaled(world.base, model.shared)
    train = world.inputs["train"]
    features = jax.jit(apply_fn)(shared, train.reshape(-1, train.shape[-1]))
    tasks = jnp.repeat(jnp.arange(world.count), train.shape[1])
    start = routing.init_router(
        jax.random.key(0), features.shape[1], world.count, hidden=64, bias=0.0
    )

    def loss_fn(router, rows, _, args):
        logits = routing.router(router, args[0][rows])
        return losses.softmax_cross_entropy(logits, args[1][rows]).mean()

    rows = np.random.default_rng(1).integers(0, len(features), (1000, 1, 128))
    run = merging.learner(lambda router, _: router, loss_fn, optax.adam(3e-3))
    router = run(start, jnp.asarray(rows), args=(features, tasks)).variables
    apply = routing.twin_apply(apply_fn, apply_fn)
    return world.normalised(lambda x: apply(router, model, world.base, x))


def one(seed: int, progress: report.Progress) -> dict[str, float]:
    """Normalised accuracy by row."""
    world = World(seed, progress)
    merged = tree.add_scaled(world.base, merging.task_arithmetic(world.taus), 0.3)
    return {
        "task arithmetic at 0.3": world.normalised(functools.partial(apply_fn, merged)),
        "SMILE, gate 4, top 1": smile(world, 16, 4, 1),
        "SMILE, gate 16, top 1": smile(world, 16, 16, 1),
        "SMILE, gate 16, all": smile(world, 16, 16, world.count),
        **we_moe(world, 300),
        "Twin, rank 16": twin(world, 16),
        "Twin, whole": twin(world, None),
    }


def main() -> None:
    """Runs the seeds one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    args = parser.parse_args()
    with report.Progress("routed merges", interval=60) as progress:
        runs = {seed: one(seed, progress) for seed in args.seeds}
    target = args.out / "routed_merges.json"
    content = {"environment": report.environment(), "normalised": runs}
    target.write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| rule | normalised % |", "|:---|---:|"]
    for name in runs[args.seeds[0]]:
        found = [100 * run[name] for run in runs.values()]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        lines.append(f"| {name} | {statistics.mean(found):.1f} ± {spread:.1f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
